"""Words for findings about the run as a whole."""

from __future__ import annotations

from collections.abc import Callable

from kronecker_probe.findings.codes import Code, Remedy
from kronecker_probe.findings.finding import Finding
from kronecker_probe.findings.words.names import are, layers
from kronecker_probe.table.numbers import listed
from kronecker_probe.table.read import label

CORRECTED = "corrected eigenvalues (SOAP, EShampoo)"


def _not_finite(one: Finding) -> str:
    loss = one.details["metric"].replace("_", " ")
    return f"the {loss} is not finite from step {one.evidence['since']:.0f} on"


def _grew(one: Finding) -> str:
    loss = one.details["metric"].replace("_", " ")
    return f"the {loss} went from {one.evidence['first']:.3g} to {one.evidence['last']:.3g}"


def _repeated(one: Finding) -> str:
    upto = "up to " if one.details["differ"] else ""
    return (
        f"in {layers(one.details['layers'])}, {upto}{one.evidence['copies']:.0f} of "
        f"{one.details['examples']} examples have the same gradients as another one"
    )


def _not_measured(one: Finding) -> str:
    names = one.details["layers"]
    were = "parameters were" if len(names) > 1 else "parameter was"
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {were} not measured ({shown})"


def _form_fits(one: Finding) -> str:
    name, _, number = one.details["worst"]
    message = (
        f"a Kronecker product fits all {one.details['count']} layers that can be judged with a "
        f"cosine of at least {one.details['least']:g}; the worst is {name} ({number})"
    )
    if worse := one.details["worse"]:
        message += f", but the optimizer's own P is clearly worse in {layers(worse)}"
    return message


def _form_fits_worst(one: Finding) -> str:
    ranked, shown = one.details["ranked"], one.details["shown"]
    first = ", then ".join(f"{name} (cosine {number})" for name, _, number in ranked[:shown])
    more = len(ranked) - shown
    rest = f"; {more} more layers may lie under {one.details['least']:g}" if more > 0 else ""
    return f"a Kronecker product fits worst in {first}{rest}"


def _optimum_not_measured(one: Finding) -> str:
    ranked, shown = one.details["ranked"], one.details["shown"]
    places = [f"{label(rule)} in {name} (cosine {number})" for name, rule, number in ranked]
    more = f", and {len(places) - shown} more" if len(places) > shown else ""
    return (
        f"the best rule measured may have a cosine under {one.details['least']:g}: "
        f"{', then '.join(places[:shown])}{more}; how well the best Kronecker product fits was "
        "not measured"
    )


def _vectors(one: Finding) -> str:
    names = one.details["layers"]
    what = "vectors" if len(names) > 1 else "a vector"
    return (
        f"{layers(names)} {are(names)} {what}; there the optimal product and Shampoo² equal H, "
        "so their cosine of 1 says nothing"
    )


def _kfac_undefined(one: Finding) -> str:
    return (
        f"K-FAC is undefined for {layers(one.details['layers'])}, because the gradient samples "
        "there hold no layer inputs (those of an embedding are tokens, and others may be given as "
        "matrices)"
    )


def _go_beyond(one: Finding) -> str:
    """What helps, for one layer or for several."""
    if one.parameter is not None:
        if one.details["beyond"]:
            return f"to go beyond it, use {CORRECTED}"
        return "no rule measured clearly goes beyond it"
    helps = one.details["helps"]
    some, none = ([name for name in helps if bool(helps[name]) == yes] for yes in (True, False))
    parts = [f"{CORRECTED} go beyond it in {listed(some)}"] if some else []
    parts += [f"no rule measured clearly goes beyond it in {listed(none)}"] if none else []
    return "; ".join(parts)


MESSAGES: dict[Code, Callable[[Finding], str]] = {
    Code.LOSS_NOT_FINITE: _not_finite,
    Code.LOSS_GREW: _grew,
    Code.REPEATED_EXAMPLES: _repeated,
    Code.NOT_MEASURED: _not_measured,
    Code.NOTHING_TO_JUDGE: lambda _: (
        "the table holds no cosine of an approximation, so no quality can be judged"
    ),
    Code.FORM_FITS: _form_fits,
    Code.FORM_FITS_WORST: _form_fits_worst,
    Code.OPTIMUM_NOT_MEASURED: _optimum_not_measured,
    Code.VECTORS: _vectors,
    Code.KFAC_UNDEFINED: _kfac_undefined,
}
ADVICE: dict[Remedy, Callable[[Finding], str]] = {
    Remedy.GO_BEYOND: _go_beyond,
}
