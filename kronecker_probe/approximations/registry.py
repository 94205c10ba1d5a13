"""Every approximation by name, with its options."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

from kronecker_probe.approximations.blocked import blocked
from kronecker_probe.approximations.divergence import divergence
from kronecker_probe.approximations.eigen_corrected import eigen_corrected, ekfac
from kronecker_probe.approximations.elementwise import diagonal, identity
from kronecker_probe.approximations.kfac import kfac, kfac_reduce, tkfac
from kronecker_probe.approximations.one_sided import left_only, right_only
from kronecker_probe.approximations.optimal import optimal
from kronecker_probe.approximations.options import Option, Spec, read_options, split
from kronecker_probe.approximations.shampoo import (
    shampoo,
    shampoo_squared,
    shampoo_squared_sequential,
)
from kronecker_probe.errors import InvalidInputError, unknown_name
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment.target import SecondMoment

DEFAULT_APPROXIMATIONS = (
    "optimal",
    "shampoo-squared",
    "kfac",
    "shampoo",
    "eigen-corrected",
    "diagonal",
)
"""What a comparison shows unless it is told otherwise."""

APPROXIMATIONS: MappingProxyType[str, Callable[..., Operator]] = MappingProxyType(
    {
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
)
"""Name -> function of a SecondMoment and the options of that approximation."""

ALIASES = MappingProxyType({"kl": "divergence:q=0"})
"""Other name -> the spec that it stands for; tables show that spec's label."""

_BLOCK_SIZE = Option("block_size", True, 1, None, "give the side of a block, an integer >= 1")
_OPTIONS = {
    "optimal": (
        Option("rank", True, 1, None, "give how many Kronecker products to sum, >= 1", default=1),
    ),
    "divergence": (
        Option(
            "q",
            False,
            0.0,
            2.0,
            "give a number from 0 to 2: 0 (KL), 1/2 (SQ), 1 (von Neumann), 2 (Frobenius)",
            required=True,
        ),
    ),
}


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
    name, given = split(spec)
    stated: dict[str, object] = dict(given)
    if name in ALIASES:
        name, meant = split(ALIASES[name])
        stated = _merged(spec, meant, stated)
    if name not in APPROXIMATIONS:
        raise unknown_name("approximation", name, [*APPROXIMATIONS, *ALIASES])
    beside = {key: value for key, value in options.items() if value is not None}
    return Spec(name, read_options(name, _merged(spec, stated, beside), options_of(name)))


def _merged(spec: str, one: dict[str, Any], other: dict[str, Any]) -> dict[str, object]:
    for key in one.keys() & other.keys():
        raise InvalidInputError(
            f"Approximation {spec!r} has {key}={one[key]} and was given {key}={other[key]!r} "
            "besides; give it once."
        )
    return one | other


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
            solution for them ("divergence" with q = 0 and too few draws).
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
