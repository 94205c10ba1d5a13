"""What the preconditioner in use is worth, and what costs it most, for one layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kronecker_probe.findings import split as causes
from kronecker_probe.findings.codes import Code, Remedy
from kronecker_probe.findings.facts import IN_USE, OPTIMAL, LayerFacts
from kronecker_probe.findings.finding import Finding
from kronecker_probe.findings.gates import truncated
from kronecker_probe.findings.split import Split
from kronecker_probe.table.numbers import CLOSE, Difference, Number

# A preconditioner behind what it could be by more than this is told.
BEHIND = 0.05
# Parts of the squared error that are worth a word.
WORTH = 0.02
# The presets that follow a rule.
PRESETS = {
    "shampoo-squared": "ShampooSquared",
    "eigen-corrected": "EShampoo or SOAP",
    "kfac": "KFAC",
    "ekfac": "EKFAC",
    "divergence:q=0": "KLShampoo",
    "shampoo": "Shampoo",
}
_CODES = {
    causes.FRESH: (Code.IN_USE_RULE, Remedy.ANOTHER_RULE),
    causes.BLOCKING: (Code.IN_USE_BLOCKS, Remedy.LARGER_BLOCKS),
    causes.STATISTICS: (Code.IN_USE_STATISTICS, Remedy.OTHER_STATISTICS),
    causes.DAMPING: (Code.IN_USE_DAMPING, Remedy.LOWER_EPSILON),
    causes.STALENESS: (Code.IN_USE_STALENESS, Remedy.REFRESH),
}


@dataclass(frozen=True)
class Shortfall:
    """The preconditioner in use, clearly below something else.

    Attributes:
        held: Its cosine.
        better: That of what it is compared with, of the same kind.
        than: What that is: "optimal", "measured" (the best rule measured) or "own" (its own rule
            on the gradient samples of H).
    """

    held: Number
    better: Number
    than: str

    @property
    def gap(self) -> Difference:
        """How far below."""
        return Difference.of(self.better, self.held)

    @property
    def far(self) -> bool:
        """Whether it has not even half of that cosine."""
        return self.held.value < self.better.value / 2


def in_use(layer: LayerFacts) -> Finding | None:
    """What is clearly below the best product, or below its own rule, with the dominant cause.

    Returns:
        None where it is close, where the table holds no preconditioner in use, or where the
        sample cannot tell.
    """
    if truncated(layer) or not layer.holds_in_use:
        return None
    rows = [row for cause in causes.CAUSES for row in layer.of(cause)]
    split = Split.of(rows, layer.plugin(OPTIMAL))
    if layer.stepwise and not split.parts and (lag := _behind_its_rule(layer)):
        return lag
    short = _below_a_product(layer)
    if short is None:
        short = _below_its_rule(layer, split)
        split = split.without(causes.FRESH)
    return None if short is None else _explained(layer, short, split)


def worst_first(found: Iterable[Finding | None]) -> list[Finding]:
    """The findings about preconditioners in use, that with the largest gap first."""
    known = [one for one in found if one is not None]
    return sorted(known, key=lambda one: -one.evidence.get("gap", one.evidence.get("lag", 0.0)))


def _explained(layer: LayerFacts, short: Shortfall, split: Split) -> Finding:
    """The shortfall, with the code and remedy of its largest cause."""
    evidence = {"gap": short.gap.value, IN_USE: short.held.value, **split.parts}
    details: dict[str, Any] = {"short": short, "rule": layer.rule, "target": layer.target}
    cause, size = split.dominant()
    level = "warning" if short.far else "notice"
    if cause and size >= WORTH:
        code, remedy = _CODES[cause]
        telling = cause == causes.STALENESS or (short.far and cause != causes.STATISTICS)
        level = "warning" if telling else "notice"
        details |= {"split": split, "worth": WORTH, "epsilon": layer.epsilon()}
        if cause == causes.FRESH:
            details["preset"] = _better_preset(layer, split.rule)
    elif layer.rule:  # what is in use is close to its rule, as it does not lag
        level, (code, remedy) = "notice", _CODES[causes.FRESH]
        details["preset"] = _better_preset(layer, math.nan)
    elif (side := layer.one_sided()) is not None and not layer.is_vector:
        code, remedy = Code.IN_USE_BLOCKS, Remedy.BOTH_SIDES
        details["side"] = side
    else:
        code = Code.IN_USE_UNEXPLAINED
        along = layer.target == "trajectory"
        remedy = Remedy.NONE if along else Remedy.TARGET_TRAJECTORY
    return Finding(level, code, layer.name, evidence, remedy, details=details)


def _better_preset(layer: LayerFacts, own: float) -> tuple[str, Number, str] | None:
    """The rule measured that fits best, its cosine and preset; None where none fits better.

    Args:
        layer: With its cosines.
        own: The cosine of the optimizer's rule on the gradient samples of H; NaN if unknown.
    """
    known = {name: layer.cosines[name] for name in PRESETS if name in layer.cosines}
    of_rule = known.pop(layer.rule, None)
    least = max(of_rule.value if of_rule else -math.inf, -math.inf if math.isnan(own) else own)
    best = max(known, key=lambda name: known[name].value, default="")
    if not best or known[best].value < least + CLOSE:
        return None
    return best, known[best], PRESETS[best]


def _below_a_product(layer: LayerFacts) -> Shortfall | None:
    """Against the optimum, or where that is not measured the best of the rules."""
    if layer.is_vector:  # of which the optimum is H itself
        return None
    measured = OPTIMAL in layer.cosines
    found = []
    for name in [OPTIMAL] if measured else layer.products:
        held, better = (layer.cosines.get(one) for one in (IN_USE, name))
        if held is None or better is None or "plugin" in (held.kind, better.kind):
            held, better = (layer.plugins.get(one) for one in (IN_USE, name))
        if held is not None and better is not None:
            found.append(Shortfall(held, better, OPTIMAL if measured else "measured"))
    best = max(found, key=lambda one: one.gap.low, default=None)
    return best if best and best.gap.low > BEHIND else None


def _below_its_rule(layer: LayerFacts, split: Split) -> Shortfall | None:
    """Against the rule on the samples of this very H, which needs no allowance for noise."""
    held = layer.plugin(IN_USE)
    if not split.rule - held > BEHIND + layer.dropped:
        return None
    error = layer.dropped / 2
    return Shortfall(Number(held, error, "plugin"), Number(split.rule, error, "plugin"), "own")


def _behind_its_rule(layer: LayerFacts) -> Finding | None:
    """How far the factors in use lag behind the same rule on fresh statistics, and since when.

    Only against the rule that the optimizer follows is a difference one of staleness and damping;
    where the table does not name it, nothing is said.
    """
    lag = _lag(layer) if layer.rule else pd.Series(dtype="float64")
    limit = BEHIND + layer.dropped
    if lag.empty or not lag.iloc[-1] > limit:
        return None
    since = since_when(lag > limit)
    evidence = {"lag": float(lag.iloc[-1]), "since": float(since)}
    if layer.target == "trajectory":  # fresh factors of the same gradients: staleness and damping
        level, code, remedy = "warning", Code.BEHIND_ITS_RULE, Remedy.REFRESH
    else:
        level, code, remedy = "notice", Code.OFF_ITS_RULE, Remedy.TARGET_TRAJECTORY
    return Finding(level, code, layer.name, evidence, remedy, details={"rule": layer.rule})


def since_when(bad: pd.Series[bool]) -> int:
    """The first step from which on all are bad; the last one is.

    Args:
        bad: By step, in order.
    """
    good = bad.index[~bad]
    return int(next(step for step in bad.index if not len(good) or step > good[-1]))


def _lag(layer: LayerFacts) -> pd.Series[float]:
    """Cosine of the fresh rule less that of the preconditioner in use, by step."""
    rows = layer.rows[(layer.rows["metric"] == "cosine") & layer.rows["value"].notna()]
    if "kind" in rows:  # what is in use is scored on the sample, so both are plug-in
        rows = rows[rows["kind"].isin(["plugin"])]
    held, fresh = (
        rows[rows["approximation"] == name].set_index("step")["value"].astype("float64")
        for name in (IN_USE, layer.rule)
    )
    return (fresh - held).dropna().sort_index()
