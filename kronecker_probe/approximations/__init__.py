"""Structured approximations of a second moment, found by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from kronecker_probe.approximations.eigen_corrected import eigen_corrected
from kronecker_probe.approximations.elementwise import diagonal
from kronecker_probe.approximations.kfac import kfac
from kronecker_probe.approximations.optimal import optimal
from kronecker_probe.approximations.shampoo import shampoo, shampoo_squared
from kronecker_probe.errors import InvalidInputError, unknown_name
from kronecker_probe.operators.diagonal import DiagonalOperator
from kronecker_probe.operators.eigen import EigenOperator
from kronecker_probe.operators.kronecker import KroneckerOperator
from kronecker_probe.operators.second_moment import SecondMoment

Approximation: TypeAlias = KroneckerOperator | EigenOperator | DiagonalOperator

APPROXIMATIONS: dict[str, Callable[[SecondMoment], Approximation]] = {
    "optimal": optimal,
    "shampoo-squared": shampoo_squared,
    "kfac": kfac,
    "shampoo": shampoo,
    "eigen-corrected": eigen_corrected,
    "diagonal": diagonal,
}


def approximate(target: SecondMoment, name: str) -> Approximation:
    """An approximation of ``target`` by name.

    Args:
        target: H.
        name: "optimal", "shampoo-squared", "kfac", "shampoo", "eigen-corrected" or "diagonal".

    Returns:
        An operator of the target's shape.

    Raises:
        UnknownNameError: No such approximation; the message suggests the nearest.
        UnsupportedError: The samples lack what it needs ("kfac" without factors).
        InvalidInputError: ``target`` is no SecondMoment.
    """
    if not isinstance(target, SecondMoment):
        raise InvalidInputError(
            f"approximate got a {type(target).__name__}; wrap the samples as kp.SecondMoment(...)."
        )
    if name not in APPROXIMATIONS:
        raise unknown_name("approximation", name, APPROXIMATIONS)
    return APPROXIMATIONS[name](target)


__all__ = ["APPROXIMATIONS", "Approximation", "approximate"]
