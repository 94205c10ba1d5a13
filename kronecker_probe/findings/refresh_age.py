"""What the age of an optimizer's bases and roots costs along a run, as far as it was seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from kronecker_probe.findings.error_causes import STALENESS
from kronecker_probe.findings.finding import Finding
from kronecker_probe.findings.fit import LayerFindings
from kronecker_probe.table.numbers import CLOSE, digits, listed
from kronecker_probe.table.read import steps_told

# Less than this of the squared error is nothing.
NEGLIGIBLE = 0.005
# Layers that a sentence names.
NAMED = 3


@dataclass(frozen=True)
class Ages:
    """How old what is held of one parameter was at the probes.

    Attributes:
        name: The parameter.
        ages: Steps since the last refresh or test, the oldest part of it, by step.
        period: Steps from one refresh or test to the next, on average; NaN if unknown.
        costs: What the age adds to the squared error, by step; empty where that is not known.
    """

    name: str
    ages: pd.Series[float]
    period: float
    costs: pd.Series[float]

    @staticmethod
    def of(rows: pd.DataFrame, name: str) -> Ages:
        """Read off the rows of one parameter."""
        events = pd.concat([_by_step(rows, "refreshes"), _by_step(rows, "tests")])
        counts = events.groupby(level=0).max()
        return Ages(
            name, _by_step(rows, "steps_since_refresh"), _period(counts), _by_step(rows, STALENESS)
        )

    @property
    def aliased(self) -> bool:
        """Whether no probe saw an age of about half of the interval or more."""
        several = len(self.ages) > 1 and math.isfinite(self.period)
        return several and float(self.ages.max()) < round(self.period) / 2 - 1


def age_findings(table: pd.DataFrame, layers: Sequence[LayerFindings]) -> list[Finding]:
    """Which ages the probes saw, and what the worst of them cost.

    Args:
        table: Of a run.
        layers: Those that were measured.
    """
    every = [Ages.of(layer.rows, layer.name) for layer in layers]
    known = [one for one in every if len(one.ages)]
    aliased = [one for one in known if one.aliased]
    return _aliased(aliased) + _cost([one for one in known if not one.aliased], table)


def _aliased(found: Sequence[Ages]) -> list[Finding]:
    if not found:
        return []
    age, period = max(int(one.ages.max()) for one in found), round(found[0].period)
    message = (
        f"no probe found {_shown(found)} more than {age} step{'s' * (age != 1)} after a refresh, "
        f"and there is one about every {period} steps: what age costs in between was not seen"
    )
    advice = f"probe off phase, with another 'every' that is no multiple of {period}"
    evidence = {"age": float(age), "period": float(period)}
    return [Finding("notice", None, "ages not seen", message, advice, evidence)]


def _cost(found: Sequence[Ages], table: pd.DataFrame) -> list[Finding]:
    """The largest cost of age seen in any layer, or that it is negligible."""
    found = [one for one in found if len(_seen(one))]
    if not found:
        return []
    worst = max(found, key=lambda one: float(_seen(one).max()))
    costs = _seen(worst)
    cost = float(costs.max())
    step = next(int(at) for at in costs.index if costs[at] == cost)
    oldest = max(int(one.ages[_seen(one).index].max()) for one in found)
    evidence = {"cost": cost, "oldest": float(oldest)}
    if cost < NEGLIGIBLE:
        message = f"age costs nothing that shows, up to the {oldest} steps without a refresh seen"
        advice = "a refresh more often (basis.frequency) would not help"
        return [Finding("notice", None, "cost of age", message, advice, evidence)] * (oldest > 0)
    age = int(worst.ages[step])
    message = (
        f"age costs at most {digits(cost)} of squared error, at {age} steps without a refresh "
        f"({worst.name}, {steps_told([step], table['step'])}; ages up to {oldest} were seen)"
    )
    advice = ""
    if cost >= CLOSE:
        advice = "a lower basis.frequency or an adaptive basis.tolerance of .1 would reduce it"
    return [Finding("notice", None, "cost of age", message, advice, evidence | {"age": float(age)})]


def _seen(one: Ages) -> pd.Series[float]:
    """The costs at steps whose age is known."""
    return one.costs[one.costs.index.isin(one.ages.index)]


def _by_step(rows: pd.DataFrame, metric: str) -> pd.Series[float]:
    """The largest value of both sides at each step."""
    of = rows[(rows["metric"] == metric) & rows["value"].notna()]
    return of.groupby("step")["value"].max().sort_index().astype("float64")


def _period(counts: pd.Series[float]) -> float:
    """Steps an event, from the counts at the first and the last probe."""
    if len(counts) < 2 or counts.iloc[-1] <= counts.iloc[0]:
        return math.nan
    steps = float(counts.index[-1] - counts.index[0])
    return steps / float(counts.iloc[-1] - counts.iloc[0])


def _shown(found: Sequence[Ages]) -> str:
    names = [one.name for one in found[:NAMED]]
    return listed([*names, f"{len(found) - NAMED} more"] if len(found) > NAMED else names)
