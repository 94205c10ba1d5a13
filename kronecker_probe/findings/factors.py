"""What the factors in use and their eigenbases say, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import pandas as pd

from kronecker_probe.findings.codes import Code, Remedy
from kronecker_probe.findings.facts import LayerFacts
from kronecker_probe.findings.finding import Finding
from kronecker_probe.findings.in_use import since_when
from kronecker_probe.findings.split import DAMPING
from kronecker_probe.table.numbers import CLOSE

# Directions below rounding are told above this share of all, from this much more scale than the
# median's. A single one is what a softmax has by construction: its gradients add up to zero.
JUNK, FEWEST, AMPLIFIED = 0.1, 2, 10.0
# The off-diagonal share from which a basis is far off: of a random one it is near 1.
FAR = 0.5
SUGGESTED = "suggested_epsilon"
_METRICS = ("factor_rank", "factor_under_floor", "factor_amplification", "factor_suggested_epsilon")


def factors(layers: Iterable[LayerFacts]) -> list[Finding]:
    """Findings about the factors that the optimizer uses."""
    found = []
    for layer in layers:
        if layer.stepwise:
            rows = layer.rows[layer.rows["metric"].isin([*_METRICS, DAMPING, "basis_off_diagonal"])]
            rows = rows[rows["value"].notna()]
            now = rows[rows["step"] == layer.last]
            found += _amplified(now, layer.name) + _basis(rows, layer)
    return _for_all(found)


def _amplified(now: pd.DataFrame, name: str) -> list[Finding]:
    """Directions without a correct digit that epsilon lets grow."""
    now = now[now["metric"].isin([*_METRICS, DAMPING])]
    places = zip(now["metric"], now["index"].fillna(-1), strict=True)
    last = dict(zip(places, now["value"], strict=True))
    sides = sorted({int(side) for metric, side in last if metric in _METRICS and side >= 0})
    junk = {side: numbers for side in sides if (numbers := _of_side(last, side)) is not None}
    if not junk:
        return []
    evidence = dict(max(junk.values(), key=lambda of: of[SUGGESTED]))
    remedy, damping = Remedy.RAISE_EPSILON, last.get((DAMPING, -1))
    if damping is not None and damping > CLOSE:
        remedy = Remedy.KEEP_EPSILON
        del evidence[SUGGESTED]
    details = {"sides": junk, "damping": damping}
    code = Code.ROUNDING_AMPLIFIED
    return [Finding("notice", code, name, evidence, remedy, details=details)]


def _of_side(last: Mapping[tuple[str, int], float], side: int) -> Mapping[str, float] | None:
    """The numbers of one factor; None where nothing is amplified that should not be."""
    rank, share, amplification, epsilon = (last.get((metric, side)) for metric in _METRICS)
    # without a suggestion, epsilon is as large as it has to be already
    if rank is None or share is None or amplification is None or epsilon is None:
        return None
    if not JUNK < share < 1 or amplification < AMPLIFIED:
        return None
    if round(rank * share / (1 - share)) < FEWEST:
        return None
    return {"share": share, "amplification": amplification, SUGGESTED: epsilon}


def _for_all(found: list[Finding]) -> list[Finding]:
    """The first one that asks for an epsilon gets that which serves all, one per group."""
    asking = [one for one in found if SUGGESTED in one.evidence]
    if not asking:
        return found
    largest = max(asking, key=lambda one: one.evidence[SUGGESTED])
    group = (len(asking), largest.parameter, largest.evidence[SUGGESTED])
    return [
        replace(one, details={**one.details, "group": group}) if one is asking[0] else one
        for one in found
    ]


def _basis(rows: pd.DataFrame, layer: LayerFacts) -> list[Finding]:
    """A basis that hardly is one of its factor any more."""
    rows = rows[(rows["metric"] == "basis_off_diagonal") & (rows["step"] <= layer.last)]
    off = {}
    for side in _sides(rows):
        shares = rows[rows["index"] == side].set_index("step")["value"].sort_index()
        if layer.last in shares.index and shares[layer.last] > FAR:
            off[side] = (since_when(shares > FAR), float(shares[layer.last]))
    if not off:
        return []
    evidence = {
        "off_diagonal": max(share for _, share in off.values()),
        "since": float(min(since for since, _ in off.values())),
    }
    return [
        Finding("warning", Code.BASIS_OFF, layer.name, evidence, Remedy.REFRESH,
                details={"sides": off})
    ]  # fmt: skip


def _sides(rows: pd.DataFrame) -> list[int]:
    return sorted(rows["index"].dropna().astype(int).unique().tolist())
