"""Words for findings about the preconditioner in use."""

from __future__ import annotations

import math
from collections.abc import Callable

from kronecker_probe.findings.codes import Code, Remedy
from kronecker_probe.findings.finding import Finding
from kronecker_probe.findings.split import CAUSES, DAMPING, FRESH, STALENESS, STATISTICS, Split
from kronecker_probe.findings.words.names import side
from kronecker_probe.table.numbers import Number, digits, listed
from kronecker_probe.table.read import label

_SINGULAR = (FRESH, DAMPING, STALENESS)


def _message(one: Finding) -> str:
    short, rule = one.details["short"], one.details["rule"]
    than = {
        "optimal": "the best Kronecker product",
        "measured": "the best Kronecker product measured",
        "own": f"its own rule{f' ({label(rule)})' if rule else ''} on the same gradient samples",
    }[short.than]
    return (
        f"the optimizer's own P has a cosine of {_number(short.held)}, where {than} has "
        f"{_number(short.better)}; {_cause(one)}"
    )


def _cause(one: Finding) -> str:
    if split := one.details.get("split"):
        return _described(split, one.details["worth"])
    if one.code is Code.IN_USE_RULE:
        return f"that is what its rule, {label(one.details['rule'])}, gives"
    if one.code is Code.IN_USE_BLOCKS:
        return f"it preconditions the {side(one.details['side'])} side alone"
    return (
        "how much its rule, batches, labels, averaging, damping and staleness cost each is not "
        "known"
    )


def _described(split: Split, least: float) -> str:
    """The causes that add at least so much, the largest first."""
    ranked = sorted(split.parts, key=lambda one: -split.parts[one])
    first, *others = [one for one in ranked if split.parts[one] >= least]
    name, verb = CAUSES[first], "costs" if first in _SINGULAR else "cost"
    if first == STATISTICS and split.with_staleness:
        name = "its statistics and the staleness of its bases"
    most = " most," if others else ""
    text = f"{name} {verb}{most} {digits(split.parts[first])} of its squared error of "
    text += digits(split.total)
    if others:
        text += f", then {listed(f'{CAUSES[o]} {digits(split.parts[o])}' for o in others)}"
    return text


def _number(number: Number) -> str:
    """A number of the sample alone without the allowance for its noise."""
    return digits(number.value) if number.kind == "plugin" else str(number)


def _behind(one: Finding) -> str:
    return (
        f"the factors in use are {one.evidence['lag']:.2f} in cosine behind fresh "
        f"{label(one.details['rule'])} since step {one.evidence['since']:.0f}"
    )


def _another_rule(one: Finding) -> str:
    if one.details["preset"] is None:
        return "another preset may fit better, but none of the rules measured here does"
    name, number, preset = one.details["preset"]
    return f"use the preset {preset}: {label(name)} has {digits(number.value)} here"


def _other_statistics(one: Finding) -> str:
    """What the optimizer's own factors stand for, and how to change or to leave out that."""
    means = ["betas[1] sets how far back they reach"]
    if one.details["rule"].startswith(("kfac", "ekfac")):
        means.append("optimizer.sampling() takes sampled labels in place of the training ones")
    if one.details["target"] == "trajectory":
        return listed(means)
    means.append("target='trajectory' scores it against the gradients that it saw")
    return f"its factors average batches at earlier weights with training labels: {listed(means)}"


def _lower_epsilon(one: Finding) -> str:
    epsilon = one.details["epsilon"]
    now = "" if math.isnan(epsilon) else f", now {epsilon:.2g}"
    return (
        f"lower spectrum.epsilon{now} (one value per parameter group), as far as training stays "
        "stable"
    )


MESSAGES: dict[Code, Callable[[Finding], str]] = {
    **dict.fromkeys(
        (
            Code.IN_USE_RULE,
            Code.IN_USE_BLOCKS,
            Code.IN_USE_STATISTICS,
            Code.IN_USE_DAMPING,
            Code.IN_USE_STALENESS,
            Code.IN_USE_UNEXPLAINED,
        ),
        _message,
    ),
    Code.BEHIND_ITS_RULE: _behind,
    Code.OFF_ITS_RULE: lambda one: (
        f"{_behind(one)}; batches, labels, averaging, damping and staleness all count in that"
    ),
}
ADVICE: dict[Remedy, Callable[[Finding], str]] = {
    Remedy.ANOTHER_RULE: _another_rule,
    Remedy.OTHER_STATISTICS: _other_statistics,
    Remedy.LOWER_EPSILON: _lower_epsilon,
}
