"""The scores of one comparison, and how they print."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import Any, final

import pandas as pd

from kronecker_probe.errors import InvalidInputError, unknown_name
from kronecker_probe.table.columns import KINDS
from kronecker_probe.table.metric_info import metric_info
from kronecker_probe.table.read import row_told


@final
@dataclass(frozen=True)
class Scores:
    """Quality numbers of one set of samples.

    Attributes:
        table: One row per number; columns parameter, m, n, n_examples, n_columns, n_positions,
            target, approximation, metric, index, kind ("plugin", "held-out", "population"), value,
            stderr, low and high (the 95 % interval), n_eff (effective samples), note. Rows without
            an approximation describe the target: "norm", "trace", "singular_value" with its
            index, all of the sample; with kind "population" also "norm", and "noise_floor", the
            cosine of the sample matrix to the population's: the plug-in cosine that H itself
            would get at this number of samples. "dropped_energy" is the share of Tr H that a
            truncation left out, where it is not 0. "skipped" rows name the parameters that were
            not measured and say why. Metrics other than the cosine, its errors and the best scale
            are of the sample matrix only: they have rows of kind "plugin", whatever estimates
            were asked for.
    """

    table: pd.DataFrame

    def pivot(self, metric: str = "cosine", kind: str | None = None) -> pd.DataFrame:
        """Parameters x approximations of one metric and kind of estimate.

        Args:
            metric: One of those measured.
            kind: "plugin", "held-out" or "population"; by default "plugin" where it was measured,
                else the kind that was.

        Raises:
            UnknownNameError: No such metric in the table, or no such kind.
            InvalidInputError: The metric was not measured in this kind; names those that were.
        """
        rows = self._rows(metric)
        if kind is not None and kind not in KINDS:
            raise unknown_name("kind of estimate", kind, KINDS)
        there = self._kinds(rows)
        if kind is None:
            valued = self._kinds(rows[rows["value"].notna()])
            kind = next(iter(valued or there), "plugin")
        elif there and kind not in there:
            raise InvalidInputError(
                f"The table holds no {metric!r} of kind {kind!r}, only {', '.join(there)}; "
                f"ask for that, or measure with estimates={kind!r}."
            )
        wide = rows[rows["kind"] == kind].pivot_table(
            index="parameter", columns="approximation", values="value", sort=False, dropna=False
        )
        return wide.rename_axis(index=None, columns=metric)

    def _rows(self, metric: str) -> pd.DataFrame:
        scored = self.table[self.table["approximation"].notna()]
        metrics = ("cosine", *scored["metric"].unique())
        if metric not in metrics:
            raise unknown_name("metric", metric, set(metrics))
        return scored[scored["metric"] == metric]

    def _kinds(self, rows: pd.DataFrame) -> list[str]:
        """The kinds that were measured, "plugin" first."""
        return [kind for kind in KINDS if (rows["kind"] == kind).any()]

    def shown(self, metric: str = "cosine") -> pd.DataFrame:
        """All kinds of one metric as text with error bars: (parameter, kind) x approximations.

        With plug-in cosines comes the noise floor of each parameter, in a column of its own.

        Raises:
            UnknownNameError: No such metric in the table.
        """
        rows = self._rows(metric)
        parameters = rows["parameter"].dropna().unique().tolist()
        kinds = self._kinds(rows)
        columns = rows["approximation"].unique().tolist()
        cells = {
            (row["parameter"], row["kind"], row["approximation"]): row_told(row)
            for row in rows.to_dict("records")
        }
        places = [(name, kind) for name in parameters for kind in kinds]
        whole = pd.DataFrame(
            [[cells.get((*place, name), "-") for name in columns] for place in places],
            index=pd.MultiIndex.from_tuples(places) if places else None,
            columns=pd.Index(columns, name=metric),
        )
        floors = self.table[self.table["metric"] == "noise_floor"].set_index("parameter")["value"]
        if metric == "cosine" and "plugin" in kinds and len(floors):
            shown = {name: "-" if math.isnan(x) else f"{x:.3f}" for name, x in floors.items()}
            first = kinds[:1]
            whole["noise floor"] = [
                shown.get(name, "-") if [kind] == first else "" for name, kind in places
            ]
        return whole

    def plot(self, **options: Any) -> Any:
        """The ladder figure: every approximation, a row a parameter; returns its Axes."""
        from kronecker_probe.plots.run import plot_ladder

        return plot_ladder(self.table, **options)

    def __repr__(self) -> str:
        return "\n".join([self.shown(self._first()).to_string(), *self._remarks()])

    def _repr_html_(self) -> str:
        remarks = (f"<p>{html.escape(remark)}</p>" for remark in self._remarks())
        return "".join([str(self.shown(self._first()).to_html()), *remarks])

    def _first(self) -> str:
        """The cosine, or what was measured in its place."""
        measured = self.table.loc[self.table["approximation"].notna(), "metric"].unique().tolist()
        return "cosine" if "cosine" in measured or not measured else str(measured[0])

    def _remarks(self) -> list[str]:
        """Which metrics have no estimates, so that nobody takes them for the population's."""
        measured = self.table.loc[self.table["approximation"].notna(), "metric"].unique()
        alone = [str(metric) for metric in measured if not metric_info(str(metric)).estimable]
        return [f"of the sample matrix only (plug-in): {', '.join(alone)}"] if alone else []
