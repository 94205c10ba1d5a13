"""What the operator that an optimizer really holds is worth, and what costs it most; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from kronecker_probe.findings.error_causes import (
    BLOCKING,
    FRESH,
    STALENESS,
    STATISTICS,
    Split,
    advice,
    one_sided,
    subject,
)
from kronecker_probe.findings.finding import Finding
from kronecker_probe.findings.staleness import STALE, Staleness, followed_rule
from kronecker_probe.table.numbers import Difference, Number, digits, numbers
from kronecker_probe.table.read import label

if TYPE_CHECKING:
    from kronecker_probe.findings.fit import LayerFindings

# Where nothing is known of the noise of plug-in numbers, only such differences are told.
UNMISTAKABLE = 0.25
# Parts of the squared error that are worth a word.
WORTH = 0.02
LIVE = "in-use"


@dataclass(frozen=True)
class Shortfall:
    """What is held, clearly below something else.

    Attributes:
        live: The cosine of what is held.
        better: That of what it is compared with, of the same kind.
        gap: Their difference.
        told: What it is compared with.
    """

    live: Number
    better: Number
    gap: Difference
    told: str

    @property
    def far(self) -> bool:
        """Whether it has not even half of that cosine."""
        return self.live.value < self.better.value / 2


def in_use_finding(layer: LayerFindings) -> Finding | None:
    """What is clearly below the best product, or below its own rule, with the dominant cause.

    Args:
        layer: Of one parameter.

    Returns:
        None where it is close, where the table holds no live operator, or where the sample cannot
        tell.
    """
    if LIVE not in set(layer.now["approximation"]):
        return None
    split = Split.of(layer.at, _plugin(layer, "optimal"))
    rule = followed_rule(layer.at)
    if layer.stepwise and not split.parts:
        stale = Staleness(layer.name, layer.rows, layer.last, layer.dropped)
        if lag := stale.findings(layer.target):
            return lag[0]
    short = _below_a_product(layer)
    if short is None:
        short = _below_its_rule(layer, split, rule)
        split = split.without(FRESH)
    if short is None:
        return None
    return _finding(layer, short, split, rule)


def worst_first(layers: Iterable[LayerFindings]) -> list[Finding]:
    """The findings about live operators, that with the largest gap first."""
    found = [one.live for one in layers if one.live is not None]
    return sorted(found, key=lambda one: -one.evidence.get("gap", one.evidence.get("lag", 0.0)))


def _finding(layer: LayerFindings, short: Shortfall, split: Split, rule: str) -> Finding:
    message = (
        f"the optimizer's own P (live) has a cosine of {_told(short.live)}, {short.told} has "
        f"{_told(short.better)}"
    )
    evidence = {"gap": short.gap.value, LIVE: short.live.value, **split.parts}
    cause, size = split.dominant()
    if cause and size >= WORTH:
        message += f"; {split.described(WORTH)}"
        telling = cause == STALENESS or (short.far and cause != STATISTICS)
        return Finding(
            "warning" if telling else "notice", layer.name, subject(cause), message,
            advice(cause, layer, rule, split.rule), evidence,
        )  # fmt: skip
    if rule:  # what is held is close to its rule, as no lag was told
        remedy = advice(FRESH, layer, rule, math.nan)
        message += f"; that is its rule, {label(rule)}"
        return Finding("notice", layer.name, subject(FRESH), message, remedy, evidence)
    level = "warning" if short.far else "notice"
    if (side := one_sided(layer.at)) and not layer.is_vector:
        message += f"; it preconditions the {side} side alone, and the other stays the identity"
        remedy = "raise shapes.max_dim above both sides, if that is what leaves one out"
        return Finding(level, layer.name, subject(BLOCKING), message, remedy, evidence)
    message += "; what its rule, batches, labels, averaging, damping and age cost each is not known"
    remedy = (
        "" if layer.target == "trajectory" else "target='trajectory' leaves out batches and labels"
    )
    return Finding(level, layer.name, subject(""), message, remedy, evidence)


def _below_a_product(layer: LayerFindings) -> Shortfall | None:
    """Against the optimum, or where that is not measured the best of the rules."""
    if layer.is_vector:  # of which the optimum is H itself
        return None
    if "optimal" in layer.cosines:
        return _shortfall(layer, ["optimal"], "where the best Kronecker product")
    return _shortfall(layer, layer.products, "where the best Kronecker product measured")


def _shortfall(layer: LayerFindings, names: Iterable[str], told: str) -> Shortfall | None:
    plain = _plugins(layer)
    found = []
    for name in names:
        live, better = (layer.cosines.get(one) for one in (LIVE, name))
        if live is None or better is None or "plugin" in (live.kind, better.kind):
            live, better = plain.get(LIVE), plain.get(name)
        if live is not None and better is not None:
            found.append(Shortfall(live, better, Difference.of(better, live), told))
    best = max(found, key=lambda one: one.gap.low, default=None)
    return best if best and best.gap.low > STALE else None


def _below_its_rule(layer: LayerFindings, split: Split, rule: str) -> Shortfall | None:
    """Against the rule on the draws of this very sample, which needs no allowance for noise."""
    live = _plugin(layer, LIVE)
    if math.isnan(live) or math.isnan(split.rule):
        return None
    gap = split.rule - live
    if not gap > STALE + layer.dropped:
        return None
    name = f" ({label(rule)})" if rule else ""
    held, better = (Number(one, layer.dropped / 2, "plugin") for one in (live, split.rule))
    told = f"where its own rule{name} on the draws of H"
    return Shortfall(held, better, Difference.of(better, held), told)


def _plugins(layer: LayerFindings) -> dict[str, Number]:
    """All plug-in cosines."""
    rows = layer.now
    if "kind" in rows:
        rows = rows[rows["kind"].isin(["plugin"]) | rows["kind"].isna()]
    noise = layer.noise if math.isfinite(layer.noise) else UNMISTAKABLE
    return numbers(pd.DataFrame(rows), "cosine", noise)


def _plugin(layer: LayerFindings, name: str) -> float:
    found = _plugins(layer).get(name)
    return found.value if found else math.nan


def _told(number: Number) -> str:
    """A number of the sample alone without the allowance for its noise."""
    return digits(number.value) if number.kind == "plugin" else str(number)
