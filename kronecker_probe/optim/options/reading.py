"""From the sections that users write to the kind of preconditioner that they describe.

An option counts as given where it differs from its default. One that the chosen kind does not have
would be without effect, and is refused here, and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.optim.options.base import Config
from kronecker_probe.optim.options.kinds import (
    CorrectedOptions,
    Epsilon,
    FromGradients,
    FromLayers,
    GraftOptions,
    InverseFreeOptions,
    Kind,
    KroneckerOptions,
    Moments,
    PolarOptions,
    Recipe,
    Refresh,
    Solver,
    Source,
    Whitened,
)
from kronecker_probe.optim.options.sections import (
    SECTIONS,
    Basis,
    Inverse,
    Magnitude,
    Shapes,
    Spectrum,
    Statistics,
    Storage,
)

_FACTORED = ("kronecker", "corrected")
_AVERAGED = (*_FACTORED, "inverse-free")

# Choice to its options, each with the values of the choice that have it. "section.*" is all others.
_HAVING: dict[str, dict[str, tuple[str, ...]]] = {
    "spectrum.eigenvalues": {
        "statistics.rule": _FACTORED,
        "statistics.accumulate": _FACTORED,
        "statistics.initial": _FACTORED,
        "statistics.every": _AVERAGED,
        "statistics.batch_size": _AVERAGED,
        "basis.carry": ("corrected",),
        "basis.marginals": ("corrected",),
        "basis.*": _FACTORED,
        "spectrum.exponent": _FACTORED,
        "spectrum.epsilon": _FACTORED,
        "spectrum.relative": _FACTORED,
        "spectrum.trace_scale": ("kronecker",),
        "spectrum.root": ("kronecker", "polar"),
        "inverse.*": ("inverse-free",),
        "shapes.max_dim": _AVERAGED,
        "shapes.merge": _AVERAGED,
        "storage.factors": _FACTORED,
        "storage.roots": ("kronecker",),
        "nesterov": ("polar",),
    },
    "statistics.rule": {
        "statistics.q": ("whitened",),
        "statistics.loss_reduction": ("kfac",),
        "statistics.initial": ("gradient",),
        "statistics.batch_size": ("gradient", "whitened"),
        "basis.marginals": ("gradient",),
        "shapes.block_size": ("gradient", "whitened"),
        "shapes.merge": ("gradient", "whitened"),
        "shapes.vectors": ("gradient", "whitened"),
    },
    "spectrum.root": {
        "basis.solver": ("eigh",),
        "basis.tolerance": ("eigh",),
    },
    "magnitude.grafting": {
        "magnitude.beta2": ("rmsprop", "adam"),
        "magnitude.epsilon": ("adagrad", "rmsprop", "adam"),
    },
}
# What to use instead of an option, by the choice that does not have it.
_INSTEAD = {("storage.factors", "inverse-free"): "inverse.precision='bfloat16'"}
_DEFAULTS: dict[str, Config] = {name: kind() for name, kind in SECTIONS.items()}


@functools.lru_cache(maxsize=1024)
def read(
    statistics: Statistics,
    basis: Basis,
    spectrum: Spectrum,
    inverse: Inverse,
    magnitude: Magnitude,
    shapes: Shapes,
    storage: Storage,
    betas: tuple[float, float],
    nesterov: bool,
    scale_by_shape: bool,
) -> Recipe:
    """The recipe of sections whose fields are each in range.

    Raises:
        InvalidInputError: An option that the chosen kind does not have, or a value that it cannot
            take; the message names the option and the kinds that have it.
    """
    sections = (statistics, basis, spectrum, inverse, magnitude, shapes, storage)
    given: dict[str, Any] = {"nesterov": nesterov} if nesterov else {}
    chosen: dict[str, Any] = {}
    for section in sections:
        default = _DEFAULTS[section.section]
        for name, value in vars(section).items():
            chosen[f"{section.section}.{name}"] = value
            if value != getattr(default, name):
                given[f"{section.section}.{name}"] = value
    _refuse_foreign(chosen, given)
    _refuse_values(statistics, spectrum)
    beta1, beta2 = betas
    moments = Moments(
        beta2=None if statistics.accumulate == "sum" else beta2,
        bias_correction=statistics.bias_correction,
        every=statistics.every,
        batch_size=statistics.batch_size,
        initial=statistics.initial,
    )
    return Recipe(
        kind=_kind(moments, statistics, basis, spectrum, inverse, storage, nesterov),
        graft=_graft(magnitude, beta2, statistics.bias_correction),
        shapes=shapes,
        beta1=beta1,
        bias_correction=statistics.bias_correction,
        scale_by_shape=scale_by_shape,
    )


def _refuse_foreign(chosen: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse an option that is given and that one of the choices does not have."""
    for choice, having in _HAVING.items():
        for option, value in given.items():
            rest = f"{option.partition('.')[0]}.*"
            kinds = having.get(option, having.get(rest))
            if kinds is not None and chosen[choice] not in kinds:
                having_it = f"{choice}={' or '.join(repr(kind) for kind in kinds)}"
                instead = _INSTEAD.get((option, chosen[choice]), having_it)
                raise InvalidInputError(
                    f"{option}={value!r} has no effect with {choice}={chosen[choice]!r}: drop it, "
                    f"or use {instead}."
                )


def _refuse_values(statistics: Statistics, spectrum: Spectrum) -> None:
    """Refuse values that the chosen kind cannot take."""
    root, products = f"spectrum.root={spectrum.root!r}", spectrum.root != "eigh"
    order = 1 / (spectrum.power if spectrum.exponent is None else -spectrum.exponent)
    kronecker = spectrum.eigenvalues == "kronecker"
    averages = statistics.bias_correction and statistics.accumulate == "average"
    refusals = {
        f"{root} finds inverse roots; use 'eigh' or 'matmul' for a polar factor.": (
            spectrum.eigenvalues == "polar" and spectrum.root == "newton"
        ),
        f"spectrum.power is {spectrum.power}, but inverse-free factors are inverses; use 1.": (
            spectrum.eigenvalues == "inverse-free" and spectrum.power != 1.0
        ),
        f"statistics.rule='whitened' needs the eigenvalues of the factors, and {root} finds none; "
        "use root='eigh'.": kronecker and products and statistics.rule == "whitened",
        f"{root} takes inverse roots of an integer order, and -1 / exponent is {order:g}; use "
        "root='eigh'.": kronecker and products and abs(order - round(order)) > 1e-9 * order,
        f"spectrum.exponent is {spectrum.exponent}, but L kron R / Tr L to the power "
        f"-{spectrum.power} takes exponent {-spectrum.power}; drop one of them.": (
            spectrum.trace_scale and spectrum.exponent not in (None, -spectrum.power)
        ),
        f"statistics.initial is {statistics.initial}, which a bias correction would blow up; use "
        "bias_correction=False, or start from 0.": statistics.initial > 0 and averages,
    }
    for text, refused in refusals.items():
        if refused:
            raise InvalidInputError(text)


def _kind(
    moments: Moments,
    statistics: Statistics,
    basis: Basis,
    spectrum: Spectrum,
    inverse: Inverse,
    storage: Storage,
    nesterov: bool,
) -> Kind:
    if spectrum.eigenvalues == "polar":
        return PolarOptions(exact=spectrum.root == "eigh", nesterov=nesterov)
    if spectrum.eigenvalues == "inverse-free":
        return InverseFreeOptions(
            every=statistics.every,
            batch_size=statistics.batch_size,
            lr=inverse.lr,
            decay=inverse.decay,
            damping=inverse.damping,
            diagonal=inverse.structure == "diagonal",
            bfloat16=inverse.precision == "bfloat16",
        )
    shared: dict[str, Any] = {
        "moments": moments,
        "source": _source(statistics),
        "refresh": Refresh(basis.frequency, basis.first, basis.stagger),
        "power": spectrum.power,
        "epsilon": Epsilon(spectrum.epsilon, spectrum.relative),
        "bfloat16": storage.factors == "bfloat16",
    }
    solver = Solver(basis.solver, basis.tolerance, basis.max_iterations)
    if spectrum.eigenvalues == "corrected":
        return CorrectedOptions(
            **shared,
            solver=solver,
            root=spectrum.power if spectrum.exponent is None else -spectrum.exponent,
            transport=basis.carry == "transport",
            marginals=basis.marginals,
        )
    holds_basis = basis.solver == "qr" or basis.tolerance is not None
    return KroneckerOptions(
        **shared,
        exponent=-spectrum.power if spectrum.trace_scale else spectrum.exponent,
        trace_scale=spectrum.trace_scale,
        roots=solver if holds_basis else spectrum.root,
        packed=storage.roots == "packed",
    )


def _source(statistics: Statistics) -> Source:
    if statistics.rule == "whitened":
        return Whitened(statistics.q)
    if statistics.rule == "kfac":
        return FromLayers(statistics.loss_reduction)
    return FromGradients()


def _graft(magnitude: Magnitude, beta2: float, bias_correction: bool) -> GraftOptions:
    averages = magnitude.grafting in ("rmsprop", "adam")
    own = beta2 if magnitude.beta2 is None else magnitude.beta2
    return GraftOptions(
        method=magnitude.grafting,
        beta2=own if averages else None,
        epsilon=magnitude.epsilon,
        bias_correction=bias_correction and magnitude.grafting == "adam",
    )
