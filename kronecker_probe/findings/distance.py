"""How far rules are from the best Kronecker product, and what goes beyond it, for one layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kronecker_probe.findings.codes import Code, Remedy
from kronecker_probe.findings.facts import OPTIMAL, PRODUCTS, LayerFacts
from kronecker_probe.findings.finding import Finding
from kronecker_probe.findings.gates import judged, population, settling
from kronecker_probe.table.numbers import CLOSE, ROUNDING, Difference, Number

# Cosines from which on a fit is called good.
GOOD = 0.9
# A cosine of Shampoo this far below that of its square is a loss by the exponent.
EXPONENT = 0.05
# Best scales outside of this range make an ungrafted step length wrong.
SCALES = (0.5, 2.0)


def distance(layer: LayerFacts, in_use_is_worse: bool) -> list[Finding]:
    """How far the closest rules are from the best Kronecker product.

    Every rule is judged by its own difference: the largest of several noisy cosines is not the
    closest one.

    Args:
        layer: That has something to judge.
        in_use_is_worse: Whether the optimizer's own P is clearly behind, so that nothing is good.
    """
    top, known = layer.cosines.get(OPTIMAL), layer.products
    if layer.is_vector or top is None or not known:
        return []
    gaps = {name: Difference.of(top, one) for name, one in known.items()}
    gaps = {name: gap for name, gap in gaps.items() if gap.kind != "mixed"}
    if not gaps:
        remedy, rules = population(layer), {"rules": list(known)}
        return [Finding("abstained", Code.KINDS_DIFFER, layer.name, {}, remedy, details=rules)]
    best = max((known[name] for name in gaps), key=lambda one: one.value)
    tied = [name for name in gaps if Difference.of(best, known[name]).low <= ROUNDING]
    leaders = {name: gaps[name] for name in tied}
    close = {name: gap for name, gap in leaders.items() if gap.high <= CLOSE}
    said = close or leaders
    first = next(iter(said.values()))
    evidence = {"gap": first.value, "stderr": first.stderr, "optimal": top.value}
    others = {name: gap for name, gap in gaps.items() if name not in said}
    details: dict[str, Any] = {"gaps": said, "others": others, "optimal": top}
    details["before"] = layer.first_optimum()
    if close:
        level, code, remedy, beyond_it = _close(layer, top, in_use_is_worse)
        details["beyond"] = beyond_it
    elif all(gap.low > CLOSE for gap in leaders.values()):
        level, code, remedy = "notice", Code.FAR, Remedy.MAKE_OPTIMAL
    else:
        widest = max(leaders.values(), key=lambda gap: gap.high - gap.low)
        remedy, amount = settling(widest, layer)
        level, code = "abstained", Code.UNCERTAIN
        details |= amount
    return [Finding(level, code, layer.name, evidence, remedy, details=details)]


def _close(
    layer: LayerFacts, top: Number, in_use_is_worse: bool
) -> tuple[str, Code, Remedy, Sequence[Code]]:
    """Rules close to the optimum; good where that is itself close to H."""
    if top.low >= GOOD:
        if in_use_is_worse:
            return "notice", Code.CLOSE_NOT_IN_USE, Remedy.NONE, ()
        return "good", Code.CLOSE, Remedy.NONE, ()
    if top.value >= GOOD:
        return "notice", Code.CLOSE_TO_UNSURE, Remedy.NONE, ()
    return "notice", Code.CLOSE_TO_POOR, Remedy.GO_BEYOND, helps(layer)


def best_product(layer: LayerFacts) -> tuple[str, Number] | None:
    """The best Kronecker product measured and its cosine, where its error is known.

    Where that is not "optimal" itself, its cosine is a lower bound of what a product can do.
    """
    if layer.is_vector or judged(layer):
        return None
    names = [OPTIMAL] if OPTIMAL in layer.cosines else PRODUCTS
    known = [(name, layer.cosines[name]) for name in names if name in layer.cosines]
    known = [one for one in known if one[1].kind == "population" or layer.exact]
    return max(known, key=lambda one: one[1].value, default=None)


def helps(layer: LayerFacts) -> list[Code]:
    """What can be preconditioned with and clearly goes beyond one Kronecker product here."""
    return [one.code for one in beyond(layer) if one.code is Code.EIGENVALUES]


def beyond(layer: LayerFacts) -> list[Finding]:
    """What leaving the set of single Kronecker products buys."""
    top = layer.cosines.get(OPTIMAL)
    if layer.is_vector or top is None:
        return []
    found = []
    gain = layer.second_product()
    if gain >= CLOSE and gain > layer.second_product_noise():
        found.append(
            Finding("notice", Code.SECOND_PRODUCT, layer.name, {"gain": gain},
                    details={"optimal": top})
        )  # fmt: skip
    corrected = layer.cosines.get("eigen-corrected")
    if corrected is not None:
        extra = Difference.of(corrected, top)
        if extra.low > CLOSE:
            found.append(
                Finding("notice", Code.EIGENVALUES, layer.name, {"gain": extra.value},
                        Remedy.CORRECT_EIGENVALUES, details={"cosine": corrected, "gain": extra})
            )  # fmt: skip
    return found


def exponent(layer: LayerFacts) -> list[Finding]:
    """Whether the exponent of Shampoo costs accuracy."""
    square, root = (layer.cosines.get(name) for name in ("shampoo-squared", "shampoo"))
    if square is None or root is None:
        return []
    if layer.holds_in_use and layer.rule != "shampoo":
        return []  # the run's optimizer has no such exponent
    gap = Difference.of(square, root)
    if gap.low <= EXPONENT:
        return []
    details = {"gap": gap, "shampoo": root, "squared": square}
    no_worse = [one for one in layer.directions() if one[1] >= one[2]]
    details["no_worse"] = no_worse
    remedy = Remedy.JUDGE_BY_STEPS if no_worse else Remedy.SQUARE
    return [
        Finding("notice", Code.EXPONENT, layer.name, {"gap": gap.value}, remedy, details=details)
    ]


def scale(layer: LayerFacts) -> list[Finding]:
    """Whether the magnitude is wrong where the direction is right."""
    scales: Mapping[str, Number] = layer.best_scales()
    found = []
    for name in ("shampoo-squared", "kfac"):
        number = scales.get(name)
        if number is None or not math.isfinite(number.stderr) or number.value <= 0:
            continue
        if number.low > SCALES[1] or number.high < SCALES[0]:
            found.append(
                Finding("notice", Code.SCALE, layer.name, {"best_scale": number.value},
                        Remedy.RESCALE, details={"rule": name})
            )  # fmt: skip
    return found
