"""Every approximation by name, with its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from types import MappingProxyType
from typing import Any, TypeVar

from kronecker_probe.approximations.blocked import blocked
from kronecker_probe.approximations.divergence import divergence
from kronecker_probe.approximations.eigen_corrected import eigen_corrected, ekfac
from kronecker_probe.approximations.elementwise import diagonal, identity
from kronecker_probe.approximations.kfac import kfac, kfac_reduce, tkfac
from kronecker_probe.approximations.one_sided import left_only, right_only
from kronecker_probe.approximations.optimal import optimal
from kronecker_probe.approximations.shampoo import (
    shampoo,
    shampoo_squared,
    shampoo_squared_sequential,
)
from kronecker_probe.errors import InvalidInputError, unknown_name
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.table.labels import LABELS
from kronecker_probe.table.specs import (
    Option,
    Spec,
    check_new_name,
    options_by_signature,
    read_options,
    split_spec,
)

Build = TypeVar("Build", bound=Callable[..., Operator])

DEFAULT_APPROXIMATIONS = (
    "optimal",
    "shampoo-squared",
    "kfac",
    "shampoo",
    "eigen-corrected",
    "diagonal",
)
"""What a comparison shows unless others are named."""

_BUILDS: dict[str, Callable[..., Operator]] = {
    "optimal": optimal,
    "shampoo-squared": shampoo_squared,
    "shampoo-squared-sequential": shampoo_squared_sequential,
    "divergence": divergence,
    "kfac": kfac,
    "kfac-reduce": kfac_reduce,
    "tkfac": tkfac,
    "left-only": left_only,
    "right-only": right_only,
    "shampoo": shampoo,
    "eigen-corrected": eigen_corrected,
    "ekfac": ekfac,
    "diagonal": diagonal,
    "identity": identity,
}
APPROXIMATIONS: MappingProxyType[str, Callable[..., Operator]] = MappingProxyType(_BUILDS)
"""Name -> function of a SecondMoment and the options of that approximation."""

ALIASES = MappingProxyType({"kl": "divergence:q=0"})
"""Other name -> the spec that it stands for; tables show that spec's label."""

_BLOCK_SIZE = Option("block_size", "give the side of a block, an integer >= 1", True, 1)
_OPTIONS: dict[str, tuple[Option, ...]] = {
    "optimal": (
        Option("rank", "give how many Kronecker products to sum, >= 1", True, 1, default=1),
    ),
    "divergence": (
        Option(
            "q",
            "give a number from 0 to 2: 0 (KL), 1/2 (SQ), 1 (von Neumann), 2 (Frobenius)",
            low=0.0,
            high=2.0,
            required=True,
        ),
    ),
}


def register_approximation(name: str, *, label: str | None = None) -> Callable[[Build], Build]:
    """Register an approximation, which ``kp.compare``, the tracker and figures then know by name.

    The decorated function gets H, a :class:`SecondMoment` on m x n matrices, and returns an
    operator of the same shape. Its keyword-only parameters with numbers as defaults are options of
    its spec, "name:option=value". Where it does not exist for the samples it raises
    ``kp.errors.UnsupportedError("why")``, which becomes a row without a value.

    Args:
        name: Letters, digits, - and _.
        label: The name in figures and sentences; by default ``name``.

    Raises:
        InvalidInputError: The name is taken or malformed, or an option has no number as default.

    Example:
        >>> @kp.register_approximation("trace", label="trace · I")  # doctest: +SKIP
        ... def trace(H):
        ...     m, n = H.shape
        ...     return kp.DiagonalOperator(torch.full((m, n), H.trace() / (m * n)))
    """
    check_new_name("approximation", name, {**APPROXIMATIONS, **ALIASES})

    def register(build: Build) -> Build:
        _OPTIONS[name] = options_by_signature(build)
        _BUILDS[name] = _checked(name, build)
        LABELS[name] = label or name
        return build

    return register


def _checked(name: str, build: Callable[..., Operator]) -> Callable[..., Operator]:
    @wraps(build)
    def checked(target: SecondMoment, **options: float) -> Operator:
        found = build(target, **options)
        if not isinstance(found, Operator) or found.shape != target.shape:
            m, n = target.shape
            shape = (
                f" on {' x '.join(map(str, found.shape))}" if isinstance(found, Operator) else ""
            )
            raise InvalidInputError(
                f"The approximation {name!r} returned a {type(found).__name__}{shape}; return an "
                f"operator on {m} x {n} matrices, such as kp.KroneckerOperator(left, right)."
            )
        return found

    return checked


def options_of(name: str) -> tuple[Option, ...]:
    """The options of an approximation, in the order of its label."""
    return (*_OPTIONS.get(name, ()), _BLOCK_SIZE)


def resolve(spec: str, **options: Any) -> Spec:
    """The approximation that a text, and options beside it, stand for.

    Args:
        spec: A name, or "name:option=value,..." such as "divergence:q=1/2" or
            "shampoo-squared:block_size=128".
        options: More options; None counts as not given.

    Returns:
        Its spec; ``.label`` is what tables call it.

    Raises:
        UnknownNameError: No such approximation or option; the message suggests the nearest.
        InvalidInputError: A malformed spec, a bad value, a missing or a repeated option.
    """
    if not isinstance(spec, str):
        raise unknown_name("approximation", spec, APPROXIMATIONS)
    name, text = split_spec("approximation", spec)
    given: dict[str, object] = dict(text)
    if name in ALIASES:
        name, meant = split_spec("approximation", ALIASES[name])
        given = _merged(spec, meant, given)
    if name not in APPROXIMATIONS:
        raise unknown_name("approximation", name, [*APPROXIMATIONS, *ALIASES])
    beside = {key: value for key, value in options.items() if value is not None}
    known = options_of(name)
    defaults = {option.name: option.default for option in known}
    chosen = read_options("approximation", name, _merged(spec, given, beside), known)
    return Spec(name, tuple((key, x) for key, x in chosen if x != defaults[key]))


def _merged(spec: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, object]:
    for key in one.keys() & other.keys():
        raise InvalidInputError(
            f"Approximation {spec!r} has {key}={one[key]} and was given {key}={other[key]!r} "
            "as well; give it once."
        )
    return {**one, **other}


def approximate(target: SecondMoment, name: str, **options: Any) -> Operator:
    """An approximation of ``target`` by name.

    Args:
        target: H.
        name: A key of APPROXIMATIONS ("optimal", "shampoo-squared", "kfac", ...), or a spec with
            options, "name:option=value,...".
        options: The same options as keywords: ``q`` of "divergence", ``rank`` of "optimal", and
            for every approximation ``block_size``: G is split into blocks of that side, as an
            optimizer's blocking does, and each block is approximated by itself.

    Returns:
        An operator of the target's shape; ``.info`` of fitted ones holds rounds and residual.

    Raises:
        UnknownNameError: No such approximation or option; the message suggests the nearest.
        UnsupportedError: The samples lack what it needs ("kfac" without factors), or it has no
            solution for them ("divergence" with q = 0 and too few examples).
        InvalidInputError: ``target`` is no SecondMoment, or an option has a bad value.
    """
    if not isinstance(target, SecondMoment):
        raise InvalidInputError(
            f"approximate got a {type(target).__name__}; wrap the samples as kp.SecondMoment(...)."
        )
    spec = resolve(name, **options)
    chosen = dict(spec.options)
    block_size = chosen.pop("block_size", None)
    build = partial(APPROXIMATIONS[spec.name], **chosen)
    return build(target) if block_size is None else blocked(target, build, int(block_size))


def as_operator(target: Operator, approximation: Operator | str) -> Operator:
    """The operator that ``approximation`` is, or that a name or spec makes of ``target``.

    Args:
        target: H.
        approximation: An operator, as it stands; or a name or spec as for ``kp.approximate``.

    Raises:
        InvalidInputError: Neither of these, or a name where ``target`` holds no samples, or
            ``target`` is no operator.
        UnknownNameError: No such approximation or option.
        UnsupportedError: The samples lack what it needs.
    """
    if not isinstance(target, Operator):
        raise InvalidInputError(
            f"A metric got a {type(target).__name__} for the target H; give an operator first "
            "(gradient samples become one by kp.SecondMoment), and the approximation second."
        )
    if isinstance(approximation, Operator):
        return approximation
    if not isinstance(approximation, str):
        raise InvalidInputError(
            f"A metric got a {type(approximation).__name__} for the approximation; give an "
            "operator (a matrix [mn, mn] becomes one by kp.DenseOperator), or the name of an "
            "approximation of H, for example 'kfac' or 'optimal:rank=2'."
        )
    if not isinstance(target, SecondMoment):
        raise InvalidInputError(
            f"The approximation {approximation!r} is fitted to samples, which a target of type "
            f"{type(target).__name__} does not hold; give H as kp.SecondMoment(samples), or an "
            "operator in place of the name."
        )
    return approximate(target, approximation)
