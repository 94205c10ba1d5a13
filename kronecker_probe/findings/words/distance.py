"""Words for findings about the quality of one layer, and for why it is not judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kronecker_probe.findings.codes import Code
from kronecker_probe.findings.finding import Finding
from kronecker_probe.findings.words.names import are, rules
from kronecker_probe.table.numbers import CLOSE, ROUNDING, Difference, digits, listed
from kronecker_probe.table.read import label, steps_told

BEST = "the best Kronecker product"


def _each(gaps: Mapping[str, Difference]) -> str:
    return listed(str(gap) for gap in gaps.values())


def _differences(gaps: Mapping[str, Difference]) -> str:
    return f"difference{'s' if len(gaps) > 1 else ''} {_each(gaps)}"


def _optimum(one: Finding) -> str:
    """The optimum's cosine, and what it was first."""
    before = one.details["before"]
    return f"cosine {one.details['optimal']}" + (
        f", from {before[1]} at step {before[0]}" if before else ""
    )


def _others(one: Finding) -> str:
    """The rules that are not the closest, with their own differences."""
    others = one.details["others"]
    if not others:
        return ""
    return f"; {listed(f'{label(name)} differs by {gap}' for name, gap in others.items())}"


def _close(ending: str) -> Callable[[Finding], str]:
    def message(one: Finding) -> str:
        gaps = one.details["gaps"]
        near = f"within {CLOSE:g} of"
        if all(gap.low <= ROUNDING and gap.high >= -ROUNDING for gap in gaps.values()):
            near = "indistinguishable from"
        said = f"{rules(gaps)} {are(gaps)} {near} {BEST} ({_differences(gaps)})"
        return f"{said}{ending.format(top=_optimum(one))}{_others(one)}"

    return message


def _far(one: Finding) -> str:
    gaps = one.details["gaps"]
    closest = "the closest rules" if len(gaps) > 1 else "the closest rule"
    return (
        f"{rules(gaps)}, {closest}, {are(gaps)} {_each(gaps)} short of {BEST} "
        f"({_optimum(one)}){_others(one)}"
    )


def _uncertain(one: Finding) -> str:
    gaps = one.details["gaps"]
    return (
        f"how far {rules(gaps)} {are(gaps)} from {BEST} is too uncertain to judge "
        f"({_differences(gaps)}; {_optimum(one)}){_others(one)}"
    )


def _kinds_differ(one: Finding) -> str:
    return (
        f"{rules(one.details['rules'])} cannot be compared with {BEST}, because no two of their "
        "numbers are of one kind"
    )


def _second_product(one: Finding) -> str:
    return (
        f"H is not one Kronecker product: the best one has cosine {one.details['optimal']}, and "
        f"the best sum of two has {one.evidence['gain']:.2f} more, but such a sum has no powers to "
        "precondition with"
    )


def _eigenvalues(one: Finding) -> str:
    return (
        f"correcting the eigenvalues in Shampoo's basis gives a cosine of {one.details['cosine']}, "
        f"{one.details['gain']} more than any Kronecker product"
    )


def _exponent(one: Finding) -> str:
    details = one.details
    message = (
        f"Shampoo's factors with exponent -1/4 are {details['gap']} below their square "
        f"(cosine {details['shampoo']} against {details['squared']})"
    )
    if no_worse := details["no_worse"]:
        shown = listed(
            f"direction cosine {digits(root)} against {digits(square)}"
            + (f" ({options})" if options else "")
            for options, root, square in no_worse
        )
        message += f", but their steps are no worse ({shown})"
    return message


def _scale(one: Finding) -> str:
    factor = one.evidence["best_scale"]
    return f"{label(one.details['rule'])} is closest to H when multiplied by {factor:.3g}"


def _why(one: Finding) -> str:
    return f" ({one.details['reason']})" if one.details["reason"] else ""


def _undefined(one: Finding) -> str:
    at = one.details["at"]
    when = f" at {steps_told(at, one.details['probed'])}" if at else ""
    return f"no cosine is defined{when}{_why(one)}"


def _truncated(one: Finding) -> str:
    return (
        f"truncation dropped {100 * one.evidence['dropped']:.2g} % of the energy of this target, "
        "so cosines with what is left say nothing about H"
    )


def _too_few(one: Finding) -> str:
    return (
        f"the {one.details['examples']:.0f} examples count as {one.evidence['n_eff']:.3g} "
        f"independent gradient samples, and with fewer than {one.details['least']} no quality "
        "number can be trusted"
    )


MESSAGES: dict[Code, Callable[[Finding], str]] = {
    Code.CLOSE: _close("; {top}"),
    Code.CLOSE_NOT_IN_USE: _close("; {top}; but the optimizer's own P is clearly worse"),
    Code.CLOSE_TO_UNSURE: _close("; {top}, which may be under .9 and then is no good fit"),
    Code.CLOSE_TO_POOR: _close(", but that product fits badly ({top})"),
    Code.FAR: _far,
    Code.UNCERTAIN: _uncertain,
    Code.KINDS_DIFFER: _kinds_differ,
    Code.SECOND_PRODUCT: _second_product,
    Code.EIGENVALUES: _eigenvalues,
    Code.EXPONENT: _exponent,
    Code.SCALE: _scale,
    Code.UNDEFINED: _undefined,
    Code.UNDEFINED_AT_STEPS: _undefined,
    Code.HELD_OUT_ONLY: lambda _: (
        "the table holds held-out cosines alone, which score factors of half the examples"
    ),
    Code.TRUNCATED: _truncated,
    Code.TOO_FEW_SAMPLES: _too_few,
}
