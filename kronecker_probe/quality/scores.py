"""The scores of one comparison, and how they print."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import pandas as pd

from kronecker_probe.errors import unknown_name
from kronecker_probe.quality.estimates.estimate import KINDS


@final
@dataclass(frozen=True)
class Scores:
    """Quality numbers of one set of samples.

    Attributes:
        table: One row a number; columns parameter, m, n, n_data, n_columns, n_positions, draws,
            approximation, metric, index, kind ("plugin", "held-out", "population"), value,
            stderr, low and high (the 95 % interval), n_eff (effective draws), note. Rows without
            an approximation describe the target: "norm", "trace", "singular_value" with its
            index, all of the sample; with kind "population" also "norm", and "noise_floor", the
            cosine of the sample matrix to the population's: the plug-in cosine that H itself
            would get at this number of draws. "skipped" rows name the parameters that were not
            measured and say why.
    """

    table: pd.DataFrame

    def pivot(self, metric: str = "cosine", kind: str = "plugin") -> pd.DataFrame:
        """Parameters x approximations of one metric and kind of estimate.

        Raises:
            UnknownNameError: No such metric in the table, or no such kind.
        """
        return self._wide(metric, kind, "value")

    def _wide(self, metric: str, kind: str, column: str) -> pd.DataFrame:
        scored = self.table[self.table["approximation"].notna()]
        metrics = ("cosine", *scored["metric"].unique())
        if metric not in metrics:
            raise unknown_name("metric", metric, set(metrics))
        if kind not in KINDS:
            raise unknown_name("kind of estimate", kind, KINDS)
        rows = scored[(scored["metric"] == metric) & (scored["kind"] == kind)]
        wide = rows.pivot_table(
            index="parameter", columns="approximation", values=column, sort=False, dropna=False
        )
        return wide.rename_axis(index=None, columns=metric)

    def shown(self, metric: str = "cosine") -> pd.DataFrame:
        """All kinds of one metric as text with error bars: (parameter, kind) x approximations.

        With the cosine comes the noise floor of each parameter, in a column of its own.

        Raises:
            UnknownNameError: No such metric in the table.
        """
        values = self._wide(metric, "plugin", "value")  # which checks the metric
        rows = self.table[(self.table["metric"] == metric) & self.table["approximation"].notna()]
        parameters = rows["parameter"].dropna().unique().tolist()
        kinds = [kind for kind in KINDS if (rows["kind"] == kind).any()]
        columns = rows["approximation"].unique().tolist() or values.columns.tolist()
        cells = {
            (row["parameter"], row["kind"], row["approximation"]): _cell(row)
            for row in rows.to_dict("records")
        }
        places = [(name, kind) for name in parameters for kind in kinds]
        whole = pd.DataFrame(
            [[cells.get((*place, name), "-") for name in columns] for place in places],
            index=pd.MultiIndex.from_tuples(places) if places else None,
            columns=pd.Index(columns, name=metric),
        )
        floors = self.table[self.table["metric"] == "noise_floor"].set_index("parameter")["value"]
        if metric == "cosine" and len(floors):
            shown = {name: "-" if math.isnan(x) else f"{x:.3f}" for name, x in floors.items()}
            first = kinds[:1]
            whole["noise floor"] = [
                shown.get(name, "-") if [kind] == first else "" for name, kind in places
            ]
        return whole

    def plot(self, **options: Any) -> Any:
        """The ladder figure: every approximation, a row a parameter; returns its Axes."""
        from kronecker_probe.plots import plot_ladder

        return plot_ladder(self.table, **options)

    def __repr__(self) -> str:
        return self.shown().to_string()

    def _repr_html_(self) -> str:
        return str(self.shown().to_html())


def _cell(row: dict[Any, Any]) -> str:
    """0.912 ± 0.008; for errors and brackets 0.412 [0.380, 0.441]; - for what is undefined."""
    value, stderr, low, high = (float(row[key]) for key in ("value", "stderr", "low", "high"))
    if math.isnan(value):
        return "-"
    if not math.isnan(stderr):
        return f"{value:.3f} ± {stderr:.3f}"
    if not math.isnan(low):
        return f"{value:.3f} [{low:.3f}, {high:.3f}]"
    return f"{value:.4f}"
