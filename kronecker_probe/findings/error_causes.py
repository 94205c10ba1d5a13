"""The causes of a live operator's error, their sizes and the options that change them; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd

from kronecker_probe.table.numbers import CLOSE, digits, listed
from kronecker_probe.table.read import label

if TYPE_CHECKING:
    from kronecker_probe.findings.fit import LayerFindings

FRESH, BLOCKING, STATISTICS, DAMPING, STALENESS = (
    f"in_use_{name}" for name in ("fresh", "blocking", "statistics", "damping", "staleness")
)
# In the words of a sentence, in the order of the chain.
CAUSES = {
    FRESH: "its rule",
    BLOCKING: "its blocks",
    STATISTICS: "its statistics",
    DAMPING: "its damping",
    STALENESS: "its age",
}
# The presets that follow a rule.
PRESETS = {
    "shampoo-squared": "ShampooSquared",
    "eigen-corrected": "EShampoo or SOAP",
    "kfac": "KFAC",
    "ekfac": "EKFAC",
    "divergence:q=0": "KLShampoo",
    "shampoo": "Shampoo",
}
SIDES = {0: "left", 1: "right"}


@dataclass(frozen=True)
class Split:
    """The squared error 1 - cos^2 of what is held, cause by cause.

    Attributes:
        parts: Cause -> what it adds, as far as that is known; of the rule only what it adds to
            the error of the best product, where that is known. Empty without a split.
        total: The whole error of the chain; NaN without a split.
        rule: The cosine of the rule on the draws of H; NaN if unknown.
        with_age: Whether the statistics include the age of the basis.
    """

    parts: Mapping[str, float]
    total: float
    rule: float
    with_age: bool = False

    @staticmethod
    def of(rows: pd.DataFrame, optimum: float) -> Split:
        """The split that the table holds.

        Args:
            rows: Of one parameter and step.
            optimum: The plug-in cosine of the best product; NaN if unknown.
        """
        of = rows[rows["metric"].isin(list(CAUSES))]
        known = {
            str(metric): float(value)
            for metric, value in zip(of["metric"], of["value"], strict=True)
            if not pd.isna(value)
        }
        error = known.get(FRESH, math.nan)
        whole = of[of["value"].isna() & (of["metric"] != STALENESS)].empty
        if not whole:  # a part that is not known would be taken for none
            known = {}
        parts = dict(known)
        if FRESH in parts and not math.isnan(optimum):
            parts[FRESH] = error - (1.0 - optimum**2)
        total = math.fsum(known.values()) if known else math.nan
        rule = math.sqrt(max(0.0, 1.0 - error)) if not math.isnan(error) else math.nan
        absent = of[of["value"].isna() & (of["metric"] == STALENESS)]
        return Split(parts, total, rule, with_age=STATISTICS in known and len(absent) > 0)

    def without(self, cause: str) -> Split:
        """Leaving one of the causes out of consideration."""
        return replace(self, parts={k: v for k, v in self.parts.items() if k != cause})

    def dominant(self) -> tuple[str, float]:
        """The cause that adds most, and how much; "" without a split."""
        cause = max(self.parts, key=lambda one: self.parts[one], default="")
        return cause, self.parts.get(cause, 0.0)

    def described(self, least: float) -> str:
        """The causes that add at least so much, the largest first, in words."""
        ranked = sorted(self.parts, key=lambda one: -self.parts[one])
        first, *others = [one for one in ranked if self.parts[one] >= least]
        verb = "costs" if first in _SINGULAR else "cost"
        most = " most," if others else ""
        text = (
            f"{self._named(first)} {verb}{most} {digits(self.parts[first])} of its squared error "
        )
        text += f"of {digits(self.total)}"
        if others:
            text += f", then {listed(f'{CAUSES[o]} {digits(self.parts[o])}' for o in others)}"
        return text

    def _named(self, cause: str) -> str:
        if cause == STATISTICS and self.with_age:
            return "its statistics and the age of its bases"
        return CAUSES[cause]


_SINGULAR = (FRESH, DAMPING, STALENESS)


def subject(cause: str) -> str:
    """What a finding with this dominant cause is about."""
    names = {
        FRESH: "the rule",
        BLOCKING: "blocks or sides left out",
        STATISTICS: "the statistics",
        DAMPING: "the damping",
        STALENESS: "the age",
    }
    return f"{names[cause]} of the optimizer's own P" if cause else "the optimizer's own P"


def _in_force(layer: LayerFindings) -> str:
    found = layer.at.loc[layer.at["metric"] == "factor_epsilon", "value"].dropna()
    return f", now {float(found.max()):.2g}" if len(found) else ""


def advice(cause: str, layer: LayerFindings, rule: str, own: float) -> str:
    """The option to change.

    Args:
        cause: The dominant one.
        layer: With its cosines and draws.
        rule: That the optimizer follows; "" if unknown.
        own: The cosine of that rule on the draws of H; NaN if unknown.
    """
    if cause == FRESH:
        return _another_rule(layer, rule, own)
    if cause == STATISTICS:
        return _other_statistics(layer.target, rule)
    return {
        BLOCKING: "raise shapes.block_size, or leave the layer whole without it",
        DAMPING: f"lower spectrum.epsilon{_in_force(layer)} (one value per parameter group), as "
        "far as training is stable with it",
        STALENESS: "refresh more often (a lower basis.frequency), or use an adaptive "
        "basis.tolerance of .1",
    }[cause]


def _another_rule(layer: LayerFindings, rule: str, own: float) -> str:
    """The preset whose rule fits best of those measured."""
    known = {name: layer.cosines[name].value for name in PRESETS if name in layer.cosines}
    own = max(known.pop(rule, -math.inf), -math.inf if math.isnan(own) else own)
    best = max(known, key=lambda name: known[name], default="")
    if not best or known[best] < own + CLOSE:
        return "another preset; of the rules measured here none fits better"
    return f"{label(best)} has {digits(known[best])} here (preset {PRESETS[best]})"


def _other_statistics(draws: str, rule: str) -> str:
    """What the optimizer's own factors stand for, and how to change or to leave out that."""
    means = ["betas[1] sets how far back they reach"]
    if rule.startswith(("kfac", "ekfac")):
        means.append("optimizer.sampling() takes sampled labels in place of the training ones")
    if draws == "trajectory":
        return listed(means)
    means.append("target='trajectory' scores it against the gradients that it saw")
    return f"they average batches at earlier weights with training labels: {', '.join(means)}"


def one_sided(rows: pd.DataFrame) -> str:
    """The only side of which factors are held, in words; "" for both or none.

    Args:
        rows: Of one parameter and step.
    """
    sides = rows.loc[rows["metric"] == "factor_rank", "index"].dropna().unique().tolist()
    return SIDES.get(int(sides[0]), "") if len(sides) == 1 else ""
