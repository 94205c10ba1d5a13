"""What staleness costs along a run, as far as the probes saw it, for all layers together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from kronecker_probe.findings.codes import Code, Remedy
from kronecker_probe.findings.facts import LayerFacts
from kronecker_probe.findings.finding import Finding
from kronecker_probe.findings.split import STALENESS
from kronecker_probe.table.numbers import CLOSE

# Less than this of the squared error is nothing.
NEGLIGIBLE = 0.005
_EVENTS = ("refreshes", "tests")


@dataclass(frozen=True)
class Ages:
    """How stale the preconditioner of one parameter was at the probes.

    Attributes:
        name: The parameter.
        ages: Steps since the last refresh or test, of the oldest part, by step.
        period: Steps from one refresh or test to the next, on average; NaN if unknown.
        costs: What staleness adds to the squared error, by step; empty where that is not known.
    """

    name: str
    ages: pd.Series[float]
    period: float
    costs: pd.Series[float]

    @staticmethod
    def of(rows: pd.DataFrame, name: str) -> Ages:
        """Read off the rows of one parameter."""
        of = rows[rows["metric"].isin(["refreshes", "tests", "steps_since_refresh", STALENESS])]
        found: dict[str, dict[int, float]] = {}  # metric -> step -> the largest value of both sides
        for metric, step, value in zip(of["metric"], of["step"], of["value"], strict=True):
            if not math.isnan(value):
                by_step = found.setdefault("events" if metric in _EVENTS else metric, {})
                by_step[step] = max(value, by_step.get(step, -math.inf))
        ages, costs, counts = (
            pd.Series(found.get(metric, {}), dtype="float64").sort_index()
            for metric in ("steps_since_refresh", STALENESS, "events")
        )
        return Ages(name, ages, _period(counts), costs[costs.index.isin(ages.index)])

    @property
    def aliased(self) -> bool:
        """Whether no probe saw a staleness of about half of the interval or more."""
        several = len(self.ages) > 1 and math.isfinite(self.period)
        return several and float(self.ages.max()) < round(self.period) / 2 - 1


def staleness(layers: Sequence[LayerFacts]) -> list[Finding]:
    """What of staleness the probes saw, and what the worst of it cost."""
    every = [Ages.of(layer.rows, layer.name) for layer in layers if layer.stepwise]
    known = [one for one in every if len(one.ages)]
    found = []
    if aliased := [one for one in known if one.aliased]:
        oldest, period = max(float(one.ages.max()) for one in aliased), round(aliased[0].period)
        # halfway between two refreshes
        details = {"layers": [one.name for one in aliased], "offset": max(1, period // 2)}
        found.append(
            Finding("notice", Code.STALENESS_UNSEEN, None,
                    {"age": oldest, "period": float(period)}, Remedy.PROBE_ELSEWHERE,
                    details=details)
        )  # fmt: skip
    return found + _cost([one for one in known if not one.aliased and len(one.costs)])


def _cost(seen: Sequence[Ages]) -> list[Finding]:
    """The largest cost of staleness seen in any layer, or that it is negligible."""
    if not seen:
        return []
    worst = max(seen, key=lambda one: float(one.costs.max()))
    cost = float(worst.costs.max())
    step = next(int(at) for at in worst.costs.index if worst.costs[at] == cost)
    oldest = max(float(one.ages[one.costs.index].max()) for one in seen)
    evidence = {"cost": cost, "oldest": oldest}
    if cost < NEGLIGIBLE:
        free = Finding("notice", Code.STALENESS_FREE, None, evidence, Remedy.NO_REFRESH)
        return [free] if oldest > 0 else []
    evidence["age"] = float(worst.ages[step])
    remedy = Remedy.REFRESH if cost >= CLOSE else Remedy.NONE
    details = {"layer": worst.name, "step": step}
    return [Finding("notice", Code.STALENESS_COST, None, evidence, remedy, details=details)]


def _period(counts: pd.Series[float]) -> float:
    """Steps per event, from the counts at the first and the last probe."""
    if len(counts) < 2 or counts.iloc[-1] <= counts.iloc[0]:
        return math.nan
    steps = float(counts.index[-1] - counts.index[0])
    return steps / float(counts.iloc[-1] - counts.iloc[0])
