"""Gates: what decides that a finding abstains, and what would settle the question.

A difference is judged only where it stands clear of its own uncertainty. Later gates (paired
differences, simultaneous intervals over layers) belong here as well: rules ask this file whether a
difference is known, and never compare errors themselves.
"""

from __future__ import annotations

import math

from kronecker_probe.findings.codes import Code, Remedy
from kronecker_probe.findings.facts import LayerFacts, reason
from kronecker_probe.findings.finding import Finding
from kronecker_probe.table.numbers import CLOSE, Difference

# Truncations that drop a larger share of the energy leave nothing to judge.
TRUNCATED = 0.05
# Independent gradient samples (by their effective number) under which no estimate is trusted.
FEWEST_SAMPLES = 30
# Fewer than so many times the examples at hand are not worth asking for; where more than so many
# times were needed, the difference is at its threshold.
WORTHWHILE, HOPELESS = 1.3, 10.0
# How many times the examples of a forecast were needed at most where it was put to the test.
FORECAST = 3


def judged(layer: LayerFacts) -> Finding | None:
    """The finding that nothing else is said of a layer; None where it can be judged."""
    if not layer.cosines:
        return _undefined(layer)
    if truncated(layer):
        remedy, evidence = Remedy.KEEP_MORE, {"dropped": layer.dropped}
        return Finding("abstained", Code.TRUNCATED, layer.name, evidence, remedy)
    if too_few(layer):
        factor = FEWEST_SAMPLES / max(layer.n_eff, 1.0)  # if it grows with the examples
        details = {
            "examples": layer.n_examples,
            "least": FEWEST_SAMPLES,
            "more": _more(layer, factor),
        }
        return Finding(
            "abstained", Code.TOO_FEW_SAMPLES, layer.name, {"n_eff": layer.n_eff},
            Remedy.MEASURE_AT_LEAST, details=details,
        )  # fmt: skip
    return None


def truncated(layer: LayerFacts) -> bool:
    """Whether too much of the target was left out to judge anything by it."""
    return layer.dropped > TRUNCATED


def too_few(layer: LayerFacts) -> bool:
    """Whether too few independent gradient samples were measured."""
    return not layer.exact and layer.n_eff < FEWEST_SAMPLES  # unknown (NaN) is not few


def _undefined(layer: LayerFacts) -> Finding:
    rows = layer.now[layer.now["metric"] == "cosine"]
    if rows["value"].notna().any():
        remedy = Remedy.ADD_ESTIMATE
        return Finding("abstained", Code.HELD_OUT_ONLY, layer.name, remedy=remedy)
    remedy = Remedy.ADD_PLUGIN if layer.exact else Remedy.NONE
    details = {
        "reason": reason(rows),
        "at": list(layer.undefined()),
        "probed": layer.rows["step"].unique().tolist() if layer.stepwise else [],
    }
    return Finding("abstained", Code.UNDEFINED, layer.name, remedy=remedy, details=details)


def undefined_steps(layer: LayerFacts) -> list[Finding]:
    """That no cosine was defined at some earlier steps."""
    steps = {step: why for step, why in layer.undefined().items() if step != layer.last}
    if not steps:
        return []
    evidence = {"steps": float(len(steps)), "last": float(max(steps))}
    details = {"at": list(steps), "probed": layer.rows["step"].unique().tolist(),
               "reason": steps[max(steps)]}  # fmt: skip
    return [Finding("abstained", Code.UNDEFINED_AT_STEPS, layer.name, evidence, details=details)]


def settling(gap: Difference, layer: LayerFacts) -> tuple[Remedy, dict[str, int]]:
    """What would tell the difference from CLOSE, for errors ~ 1/sqrt(N), and how much of it."""
    if gap.kind == "bracket":
        return (Remedy.REFITS_LATER if layer.stepwise else Remedy.REFITS), {}
    if gap.kind == "plugin" or not math.isfinite(gap.stderr) or math.isnan(layer.n_examples):
        return population(layer), {}
    reach, margin = 2 * gap.stderr, abs(gap.value - CLOSE)
    if reach > CLOSE:  # where the difference comes to lie is not known yet
        return _forecast(layer, (reach / CLOSE) ** 2)
    if reach**2 > HOPELESS * margin**2:
        return Remedy.AT_THRESHOLD, {}
    return _forecast(layer, (reach / margin) ** 2)


def population(layer: LayerFacts) -> Remedy:
    """How to come by population estimates."""
    return Remedy.MEASURE_MORE if layer.has_population else Remedy.ADD_POPULATION


def _forecast(layer: LayerFacts, factor: float) -> tuple[Remedy, dict[str, int]]:
    """A range: the error that it extrapolates is an estimate, which the forecast squares."""
    least = _more(layer, factor)
    return Remedy.MEASURE_BETWEEN, {"least": least, "most": FORECAST * least}


def _more(layer: LayerFacts, factor: float) -> int:
    """So many times the examples, in tens, and not just a few more than there are."""
    return math.ceil(layer.n_examples * max(factor, WORTHWHILE) / 10) * 10
