"""Facts: what the table holds about one layer, as numbers, names and codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import pandas as pd

from kronecker_probe.table.codes import ReasonCode
from kronecker_probe.table.numbers import Number, numbers

# Kronecker products without a fit.
PRODUCTS = ("shampoo-squared", "kfac", "shampoo")
IN_USE = "in-use"
OPTIMAL = "optimal"
# Where nothing is known of the noise of plug-in numbers, only such differences are judged.
UNMISTAKABLE = 0.25
# Targets that are the matrix itself and no sample of it.
_EXACT = ("batch-gradient", "trajectory")
_DIRECTION = "direction_cosine"
# The columns of a number.
_READ = ("approximation", "metric", "index", "kind", "value", "stderr", "low", "high", "interval")


class LayerFacts:
    """The numbers of one parameter at the last step where it was measured.

    Attributes:
        name: The parameter.
        rows: All of its rows.
        stepwise: Whether the table is one of a run.
        last: The step that is judged; 0 for a table without steps.
        at: The rows of that step.
        now: Those of them that are about an approximation.
        target: Which H was measured.
        exact: Whether the target is the matrix itself and no sample of it.
        dropped: The share of the target's energy that truncation left out.
        noise: How far off a plug-in cosine may be; infinite where nothing is known of it.
        cosines: The best known cosine of each approximation.
        n_eff: Effective number of independent gradient samples; NaN if unknown.
        n_examples: Examples measured; NaN if unknown.
        is_vector: Whether the parameter has one row or column, so that the optimum is H itself.
    """

    def __init__(self, rows: pd.DataFrame, name: str) -> None:
        self.name = name
        self.rows = rows
        self.stepwise = "step" in rows
        quality = self.rows[self.rows["approximation"].notna()]
        self.last = int(quality["step"].max()) if self.stepwise else 0
        self.now = quality[quality["step"] == self.last] if self.stepwise else quality
        self.at = self.rows[self.rows["step"] == self.last] if self.stepwise else self.rows
        self.target = next(iter(_column(self.now, "target").astype(str)), "")
        self.exact = self.target in _EXACT or _has(self.now, ReasonCode.NOT_INDEPENDENT)
        self._by_metric: dict[str, list[dict[Any, Any]]] = {}
        for row in self.at[[name for name in _READ if name in self.at]].to_dict("records"):
            self._by_metric.setdefault(str(row["metric"]), []).append(row)
        self.dropped = next(iter(reversed(self.values("dropped_energy"))), 0.0)
        self.noise = max(self._sampling_noise(), self.dropped)
        self.cosines = numbers(self.scored("cosine"), self.noise)
        # K-FAC may count fewer samples of its factors than there are of H
        self.n_eff = float(_column(self.now, "n_eff").astype("float64").max())
        self.n_examples = float(_column(self.now, "n_examples").astype("float64").min())
        self.is_vector = any(_column(self.now, side).min() == 1 for side in ("m", "n"))

    def _sampling_noise(self) -> float:
        """What an exact Kronecker product of so many samples would lose of its cosine."""
        if self.exact:
            return 0.0
        floor = self.values("noise_floor")
        return max(0.0, 1.0 - floor[-1]) if floor else math.inf

    def of(self, metric: str) -> list[dict[Any, Any]]:
        """The rows of a metric at the step that is judged, with the columns of a number."""
        return self._by_metric.get(metric, [])

    def scored(self, metric: str) -> list[dict[Any, Any]]:
        """Those that are about an approximation."""
        return [row for row in self.of(metric) if not pd.isna(row["approximation"])]

    def values(self, metric: str) -> list[float]:
        """The defined values of a metric at that step, in the table's order."""
        return [float(row["value"]) for row in self.of(metric) if not pd.isna(row["value"])]

    @property
    def products(self) -> dict[str, Number]:
        """The cosines of the rules without a fit."""
        return {name: self.cosines[name] for name in PRODUCTS if name in self.cosines}

    @property
    def holds_in_use(self) -> bool:
        """Whether the table has a row of the preconditioner in use."""
        return IN_USE in set(self.now["approximation"])

    @property
    def has_population(self) -> bool:
        """Whether anything has a population estimate."""
        return "kind" in self.now and bool((self.now["kind"] == "population").any())

    @cached_property
    def rule(self) -> str:
        """The approximation that the optimizer's rule makes of fresh statistics; "" if unknown."""
        return followed_rule(self.at)

    @cached_property
    def plugins(self) -> dict[str, Number]:
        """All plug-in cosines."""
        rows = [row for row in self.scored("cosine") if _kind(row) == "plugin"]
        noise = self.noise if math.isfinite(self.noise) else UNMISTAKABLE
        return numbers(rows, noise)

    def plugin(self, name: str) -> float:
        """A plug-in cosine; NaN if unknown."""
        found = self.plugins.get(name)
        return found.value if found else math.nan

    def best_scales(self) -> dict[str, Number]:
        """The scale c at which c P is closest to H, by approximation."""
        unknown = self.noise > 0 and not self.exact
        return numbers(self.scored("best_scale"), math.inf if unknown else self.noise)

    def second_product(self) -> float:
        """The cosine that a second Kronecker product adds, of the sample matrix; 0 if unknown."""
        ordered = sorted(self.of("singular_value"), key=lambda row: float(row["index"]))
        values = [float(row["value"]) for row in ordered]
        norms = [float(row["value"]) for row in self.of("norm") if _kind(row) == "plugin"]
        if len(values) < 2 or not norms or not values[0] > 0 or not norms[0] > 0:
            return 0.0
        gain: float = values[0] / norms[0] * (math.hypot(1.0, values[1] / values[0]) - 1.0)
        return 0.0 if math.isnan(gain) else gain

    def second_product_noise(self) -> float:
        """What that gain must exceed to be more than sampling noise."""
        if self.exact:
            return self.noise
        of = [row for row in self.scored("cosine") if row["approximation"] == OPTIMAL]
        kinds = {row.get("kind"): row["value"] for row in of if not pd.isna(row["value"])}
        if not {"plugin", "population"} <= kinds.keys():
            return math.inf
        bias = abs(float(kinds["plugin"]) - float(kinds["population"]))
        return max(self.noise, bias, 2 * self.cosines[OPTIMAL].stderr)

    def directions(self) -> list[tuple[str, float, float]]:
        """(options, Shampoo's, Shampoo^2's) direction cosines, one per metric that has both."""
        found = []
        for metric in self._by_metric:
            if not metric.startswith(_DIRECTION):
                continue
            of = [row for row in self.scored(metric) if not pd.isna(row["value"])]
            values = {row["approximation"]: row["value"] for row in of}
            if {"shampoo", "shampoo-squared"} <= values.keys():
                options = str(metric).removeprefix(_DIRECTION).lstrip(":")
                found.append((options, float(values["shampoo"]), float(values["shampoo-squared"])))
        return found

    def undefined(self) -> dict[int, str]:
        """The steps at which no cosine is defined, with a reason; none for one that is not a run.

        Reasons beside the preconditioner in use count only where no other approximation has one.
        """
        rows = self.rows[(self.rows["metric"] == "cosine") & self.rows["approximation"].notna()]
        if not self.stepwise or rows.empty:
            return {}
        defined = rows["value"].notna().groupby(rows["step"]).any()
        return {int(step): reason(rows[rows["step"] == step]) for step in defined.index[~defined]}

    def first_optimum(self) -> tuple[int, Number] | None:
        """The first step with a cosine of the optimum of today's kind, if that is another one."""
        top = self.cosines.get(OPTIMAL)
        if top is None or not self.stepwise:
            return None
        of = self.rows
        rows = of[(of["metric"] == "cosine") & (of["approximation"] == OPTIMAL)]
        rows = rows[rows["value"].notna() & (rows["step"] < self.last)]
        for step in sorted(rows["step"].unique()):
            here = rows[rows["step"] == step].to_dict("records")
            found = numbers(here, self.noise).get(OPTIMAL)
            if found is not None and found.kind == top.kind:
                return int(step), found
        return None

    def one_sided(self) -> int | None:
        """The only side of which the optimizer holds a factor: 0 (left) or 1; None for both."""
        sides = {row["index"] for row in self.of("factor_rank") if not pd.isna(row["index"])}
        return int(sides.pop()) if len(sides) == 1 else None

    def epsilon(self) -> float:
        """The largest epsilon in force; NaN if unknown."""
        return max(self.values("factor_epsilon"), default=math.nan)


def _kind(row: Mapping[str, Any]) -> str:
    kind = row.get("kind")
    return "plugin" if pd.isna(kind) else str(kind)


def _column(rows: pd.DataFrame, column: str) -> pd.Series[float]:
    return rows[column].dropna() if column in rows else pd.Series(dtype="float64")


def _has(rows: pd.DataFrame, code: ReasonCode) -> bool:
    return "reason" in rows and bool(rows["reason"].eq(code).any())


def followed_rule(rows: pd.DataFrame) -> str:
    """The approximation whose rule the optimizer follows; "" if unknown or in blocks.

    Args:
        rows: Of one parameter and step.
    """
    if "rule" not in rows:
        return ""
    whole = rows[(rows["metric"] == "in_use_rule") & rows["rule"].notna()]
    if "block_size" in rows:  # staleness alone does not separate blocks from the whole rule
        whole = whole[whole["block_size"].isna()]
    return str(whole["rule"].iloc[-1]) if len(whole) else ""


def reason(rows: pd.DataFrame) -> str:
    """Why the values of these rows are undefined, in the table's words; "" if it has none."""
    if "note" not in rows:
        return ""
    noted = rows[rows["value"].isna() & rows["note"].notna()]
    others = noted[noted["approximation"] != IN_USE]
    notes = (others if len(others) else noted)["note"]
    return str(notes.iloc[0]) if len(notes) else ""


def repeated(rows: pd.DataFrame) -> tuple[int, int] | None:
    """(examples whose gradients another one has too, all of them); None where none is known.

    Args:
        rows: About one layer's norm.
    """
    if "copies" not in rows:
        return None
    found = rows[rows["copies"].notna()]
    return (int(found["copies"].iloc[0]), int(found["n_examples"].iloc[0])) if len(found) else None


def lacks_kfac_factors(rows: pd.DataFrame) -> bool:
    """Whether a K-FAC is undefined for want of layer inputs and output gradients."""
    return _has(rows, ReasonCode.NO_FACTORS)


def asked_for(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of skipped parameters without those that were not selected."""
    if "reason" not in rows:
        return rows
    return rows[~rows["reason"].eq(ReasonCode.NOT_SELECTED).fillna(False).astype(bool)]
