"""What the inside of an optimizer says: its factors and their bases; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import pandas as pd

from kronecker_probe.findings.error_causes import DAMPING, SIDES
from kronecker_probe.findings.finding import Finding
from kronecker_probe.table.numbers import CLOSE, digits, listed

# Junk is told of above this share of the directions, from this much more scale than the median's.
# A single direction is what a softmax has by construction: its gradients add up to zero.
JUNK, FEWEST, AMPLIFIED = 0.1, 2, 10.0
# From here down no larger epsilon is worth asking for.
ENOUGH = 2
# The off-diagonal share from which a basis is far off: of a random one it is near 1.
FAR = 0.5
SUBJECT = "directions below rounding"
SUGGESTED = "suggested_epsilon"
_METRICS = ("factor_rank", "factor_under_floor", "factor_amplification", "factor_suggested_epsilon")


def factor_findings(layers: Iterable[tuple[str, pd.DataFrame, int]]) -> list[Finding]:
    """Findings about the factors that the live optimizer holds.

    Args:
        layers: Of each parameter its name, its rows of a run's table, and the step that is judged.
    """
    found = []
    for name, rows, last in layers:
        inside = rows[rows["approximation"].isna() & rows["value"].notna()]
        found += _junk(inside[inside["step"] == last], name) + _basis(inside, name, last)
    return _for_all(found)


def _junk(now: pd.DataFrame, name: str) -> list[Finding]:
    """Directions without a correct digit that epsilon lets grow."""
    junk = {
        side: numbers
        for side in _sides(now)
        if (numbers := _amplified(now[now["index"] == side])) is not None
    }
    if not junk:
        return []
    several = len(junk) > 1
    shares = listed(
        f"{100 * of['share']:.0f} % of the directions of the {_side(side)} factor"
        for side, of in junk.items()
    )
    times = listed(f"{of['amplification']:.2g}" for of in junk.values())
    message = (
        f"{shares} are below {'their' if several else 'its'} rounding, and epsilon scales them "
        f"{times} times as much as the median one"
    )
    worst = max(junk.values(), key=lambda of: of[SUGGESTED])
    damping = _number(now, DAMPING)
    if damping is not None and damping > CLOSE:
        advice = (
            "a larger epsilon (spectrum.epsilon) would not, but damping costs "
            f"{digits(damping)} of squared error already"
        )
        evidence = {key: value for key, value in worst.items() if key != SUGGESTED}
        return [Finding("notice", name, SUBJECT, message, advice, evidence)]
    advice = (
        f"an epsilon (spectrum.epsilon) of {worst[SUGGESTED]:.1e} would not, and from an "
        f"amplification of about {ENOUGH} down nothing more is to be asked for; harmless only "
        "where inputs or outputs are constant"
    )
    return [Finding("notice", name, SUBJECT, message, advice, worst)]


def _amplified(of: pd.DataFrame) -> Mapping[str, float] | None:
    """The numbers of one factor; None where nothing is amplified that should not be."""
    rank, share, amplification, epsilon = (_number(of, metric) for metric in _METRICS)
    # without a suggestion, epsilon is as large as it has to be already
    if rank is None or share is None or amplification is None or epsilon is None:
        return None
    if not JUNK < share < 1 or amplification < AMPLIFIED:
        return None
    if round(rank * share / (1 - share)) < FEWEST:
        return None
    return {"share": share, "amplification": amplification, SUGGESTED: epsilon}


def _for_all(found: list[Finding]) -> list[Finding]:
    """With the epsilon that serves all layers, as there is one for a group of parameters."""
    asking = [one for one in found if SUGGESTED in one.evidence]
    if not asking:
        return found
    largest = max(asking, key=lambda one: one.evidence[SUGGESTED])
    if len(asking) == 1:
        more = (
            "epsilon is one per parameter group: a group of its own leaves the others as they are"
        )
    else:
        more = (
            "epsilon is one per parameter group: the largest asked for, "
            f"{largest.evidence[SUGGESTED]:.1e} for {largest.parameter}, serves all "
            f"{len(asking)} layers, or give it groups"
        )
    return [
        replace(one, advice=f"{one.advice}; {more}") if one is asking[0] else one for one in found
    ]


def _basis(rows: pd.DataFrame, name: str, last: int) -> list[Finding]:
    """A basis that hardly is one of its factor any more."""
    held = rows[rows["metric"] == "basis_off_diagonal"]
    off = {}
    for side in _sides(held):
        shares = held[held["index"] == side].set_index("step")["value"].sort_index()
        if last in shares.index and shares[last] > FAR:
            steps = [int(step) for step in shares.index if step <= last]
            good = [step for step in steps if not shares[step] > FAR]
            since = next(step for step in steps if not good or step > good[-1])
            off[side] = (since, float(shares[last]))
    if not off:
        return []
    told = listed(
        f"of the {_side(side)} factor is far off since step {since} "
        f"(off-diagonal share {share:.2f})"
        for side, (since, share) in off.items()
    )
    advice = "refresh it more often, or use an adaptive tolerance (basis.tolerance) of .1"
    evidence = {
        "off_diagonal": max(share for _, share in off.values()),
        "since": float(min(since for since, _ in off.values())),
    }
    return [Finding("warning", name, "held basis", f"the basis held {told}", advice, evidence)]


def _sides(rows: pd.DataFrame) -> list[int]:
    return sorted({int(side) for side in rows["index"].dropna() if not math.isnan(side)})


def _number(now: pd.DataFrame, metric: str) -> float | None:
    values = now.loc[now["metric"] == metric, "value"]
    return float(values.iloc[-1]) if len(values) else None


def _side(side: int) -> str:
    return SIDES.get(side, f"dimension-{side}")
