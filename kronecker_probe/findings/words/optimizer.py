"""Words for findings about refreshes and about the factors in use."""

from __future__ import annotations

from collections.abc import Callable

from kronecker_probe.findings.codes import Code, Remedy
from kronecker_probe.findings.finding import Finding
from kronecker_probe.findings.words.names import layers, side
from kronecker_probe.table.numbers import digits, listed

# From this amplification down no larger epsilon is worth asking for.
ENOUGH = 2


def _unseen(one: Finding) -> str:
    age, period = one.evidence["age"], one.evidence["period"]
    when = "right after" if age == 0 else f"at most {_steps(age)} after"
    return (
        f"every probe of {layers(one.details['layers'])} fell {when} a refresh, and a refresh "
        f"comes about every {period:.0f} steps, so staleness was never measured"
    )


def _cost(one: Finding) -> str:
    return (
        f"staleness adds at most {digits(one.evidence['cost'])} to the squared error, after "
        f"{_steps(one.evidence['age'])} without a refresh ({one.details['layer']}, step "
        f"{one.details['step']}; the probes saw up to {_steps(one.evidence['oldest'])})"
    )


def _free(one: Finding) -> str:
    return f"no measurable loss from staleness up to {_steps(one.evidence['oldest'])}"


def _steps(number: float) -> str:
    return f"{number:.0f} step{'s' * (number != 1)}"


def _amplified(one: Finding) -> str:
    sides = one.details["sides"]
    shares = listed(
        f"{100 * of['share']:.0f} % of the directions of the {side(number)} factor"
        for number, of in sides.items()
    )
    times = listed(f"{of['amplification']:.2g}" for of in sides.values())
    return (
        f"{shares} lie below {'their' if len(sides) > 1 else 'its'} rounding error and hold no "
        f"correct digit, but the optimizer scales them {times} times as much as the median one"
    )


def _raise_epsilon(one: Finding) -> str:
    advice = (
        f"raise spectrum.epsilon to {one.evidence['suggested_epsilon']:.1e}, unless the inputs or "
        f"outputs there are constant, where it does no harm; below an amplification of {ENOUGH} "
        "nothing is gained"
    )
    if group := one.details.get("group"):
        count, name, largest = group
        advice += "; epsilon is one value per parameter group"
        if count == 1:
            advice += ", so give this layer a group of its own"
        else:
            advice += f": {largest:.1e}, for {name}, serves all {count} layers"
    return advice


def _basis_off(one: Finding) -> str:
    off = listed(
        f"of the {side(number)} factor since step {since} (off-diagonal share {share:.2f})"
        for number, (since, share) in one.details["sides"].items()
    )
    return f"the eigenbasis in use no longer fits: {off}"


MESSAGES: dict[Code, Callable[[Finding], str]] = {
    Code.STALENESS_UNSEEN: _unseen,
    Code.STALENESS_COST: _cost,
    Code.STALENESS_FREE: _free,
    Code.ROUNDING_AMPLIFIED: _amplified,
    Code.BASIS_OFF: _basis_off,
}
ADVICE: dict[Remedy, Callable[[Finding], str]] = {
    Remedy.RAISE_EPSILON: _raise_epsilon,
}
