"""Numbers that are undefined: NaN with a warning for a caller, a note in a table."""

from __future__ import annotations

import math
import warnings

from kronecker_probe.errors import InvalidInputError, UndefinedMetricWarning
from kronecker_probe.operators.base import Operator
from kronecker_probe.table.codes import ReasonCode

# Inner products of H with its own factors scale as |H|^3, which must stay inside float64.
LARGEST_NORM = 1e95


class UndefinedError(Exception):
    """Why a number is undefined here; turned into NaN before it reaches a caller.

    Args:
        message: For people.
        code: For the column ``reason``.
    """

    def __init__(self, message: str, code: ReasonCode = ReasonCode.UNDEFINED) -> None:
        super().__init__(message)
        self.code = code


def warn_undefined(metric: str, reason: object, stacklevel: int = 3) -> float:
    """NaN, with an UndefinedMetricWarning that says why."""
    warnings.warn(f"{metric}: {reason}.", UndefinedMetricWarning, stacklevel=stacklevel)
    return math.nan


def check_pair(target: Operator, approximation: Operator) -> None:
    """Refuse what is no pair of operators of one shape.

    Raises:
        InvalidInputError: One is no operator, or the shapes differ.
        UndefinedError: The target is zero or beyond float64, or the approximation not finite.
    """
    for one in (target, approximation):
        if not isinstance(one, Operator):
            raise InvalidInputError(
                f"A metric got a {type(one).__name__}; give operators (a matrix [mn, mn] becomes "
                "one by kp.DenseOperator, gradient samples by kp.SecondMoment)."
            )
    if target.shape != approximation.shape:
        raise InvalidInputError(
            f"A metric got operators on {target.shape[0]} x {target.shape[1]} and "
            f"{approximation.shape[0]} x {approximation.shape[1]} matrices; both must have one "
            "shape."
        )
    trace = target.trace()
    if trace == 0.0:
        raise UndefinedError("H = 0: no quality number is defined", ReasonCode.ZERO)
    if not math.isfinite(trace):
        raise UndefinedError(f"Tr H = {trace}: the target is not finite", ReasonCode.NOT_FINITE)
    if not 1.0 / LARGEST_NORM < trace < LARGEST_NORM:
        raise UndefinedError(
            f"Tr H = {trace:.3g} is beyond what float64 can score; rescale the loss",
            ReasonCode.OUT_OF_RANGE,
        )
    if not math.isfinite(approximation.trace()):
        raise UndefinedError("P is not finite", ReasonCode.NOT_FINITE)


def resolve_damping(target: Operator, damping: float, relative: bool) -> float:
    """The d of H + d I in units of H.

    Args:
        target: H, not zero.
        damping: rho where ``relative``, for d = rho Tr H / (mn), rho mean eigenvalues; else d.
        relative: Which of the two.

    Raises:
        InvalidInputError: The damping is not positive and finite.
    """
    if isinstance(damping, bool) or not isinstance(damping, int | float):
        raise InvalidInputError(f"damping={damping!r}; give a positive number.")
    if not (math.isfinite(damping) and damping > 0):
        raise InvalidInputError(
            f"damping={damping!r}; give a positive number: H has at most as many nonzero "
            "eigenvalues as samples, so that without damping no inverse power of it exists."
        )
    m, n = target.shape
    return damping * target.trace() / (m * n) if relative else float(damping)
