"""How well a factor is resolved in its precision, and what epsilon does to the rest of it."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, UnsupportedError
from kronecker_probe.linalg.eigenbasis import eigh_descending
from kronecker_probe.operators.factors.factor import Factor

# Roundings of one sum that an average over many steps may hold; what is more is no rounding.
ACCUMULATED = 100.0
TINY = torch.finfo(torch.float64).tiny


@dataclasses.dataclass(frozen=True)
class FactorHealth:
    r"""The spectrum lambda_1 >= ... >= lambda_k of a PSD factor A, seen in its precision.

    The **floor** is the size of the rounding errors in the spectrum: k u lambda_1 from the
    decomposition, with u the machine epsilon of the dtype, at least float32, or ||A||_F u' / 2
    from storage in a lower precision of epsilon u', where that is more; or the size of the most
    negative eigenvalue, which a PSD matrix has by rounding only: an average over thousands of steps
    holds more of it than a single sum. An eigenvalue at or below the floor has no correct digit,
    and its eigenvector no meaning.

    Attributes:
        size: k.
        largest: lambda_1.
        relative_floor: The floor over lambda_1.
        numerical_rank: How many eigenvalues are above the floor.
        stable_rank: ||A||_F^2 / ||A||_2^2 = sum_i lambda_i^2 / lambda_1^2; 0 for A = 0.
        below_floor_share: (k - numerical_rank) / k.
        amplification: How much more (A + epsilon I)^exponent scales a direction below the floor,
            taken as null, than one of the median resolved eigenvalue lambda_med (the lower one of
            two): ((lambda_med + epsilon) / epsilon)^-exponent. Infinite for epsilon = 0 (unless
            roots are pseudo-inverse); 1 if nothing is below the floor, or everything is.
        suggested_relative_epsilon: Over lambda_1. With it no direction below the floor is scaled
            by more than 2^-exponent times what the least resolved one is: the least resolved
            eigenvalue, or the floor if all or none are resolved.
        suggested_relative_cutoff: Over lambda_1: directions with eigenvalues at or below it are
            noise, and can be treated as null instead of being damped. The floor.
    """

    size: int
    largest: float
    relative_floor: float
    numerical_rank: int
    stable_rank: float
    below_floor_share: float
    amplification: float
    suggested_relative_epsilon: float
    suggested_relative_cutoff: float


def factor_health(
    factor: Tensor | Factor,
    epsilon: float,
    *,
    exponent: float = -0.25,
    dtype: torch.dtype | None = None,
) -> FactorHealth:
    """The health of one symmetric PSD factor.

    Args:
        factor: [k, k], undamped.
        epsilon: The absolute damping of the run, in the units of the factor.
        exponent: Of the root that the run takes of the factor, below 0.
        dtype: In which the run holds the factor; None for that of the tensor, or float64.

    Raises:
        NonFiniteError: The factor holds a NaN or an infinity.
        InvalidInputError: Not square, not PSD up to rounding, or an option out of range.
        UnsupportedError: Not a real floating-point dtype.
    """
    if isinstance(factor, Factor):
        held = torch.float64 if dtype is None else dtype
        matrix = factor.matrix
    else:
        held = factor.dtype if dtype is None else dtype
        matrix = factor.detach()
    if not (held.is_floating_point and matrix.is_floating_point()):
        raise UnsupportedError(f"A factor of dtype {held}; give a real floating-point one.")
    if not 0 <= epsilon < math.inf:
        raise InvalidInputError(f"epsilon={epsilon}; give a finite number, at least 0.")
    if not -math.inf < exponent < 0:
        raise InvalidInputError(f"exponent={exponent}; give a finite one below 0, like -0.25.")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise InvalidInputError(f"A factor is square, [k, k]; got {list(matrix.shape)}.")
    values, _ = eigh_descending(matrix.double())
    return _health(values, epsilon, exponent, held)


def _health(values: Tensor, epsilon: float, exponent: float, dtype: torch.dtype) -> FactorHealth:
    """Of the eigenvalues, float64 [k], descending, of a matrix held in ``dtype``."""
    size, largest = len(values), float(values[0])
    relative_floor = _relative_floor(values, dtype)
    negative = -float(values[-1]) / float(values.abs().max().clamp_min(TINY))
    if negative > ACCUMULATED * relative_floor:
        raise InvalidInputError(
            f"The factor [{size}, {size}] has eigenvalues from {float(values[-1]):.3g} to "
            f"{largest:.3g}, so that it is not PSD in {dtype}; look for statistics that were "
            "accumulated in a lower precision (TF32, autocast)."
        )
    relative_floor = max(relative_floor, negative)
    resolved = values[values > relative_floor * largest]
    rank = len(resolved)
    complete = rank in (0, size)
    return FactorHealth(
        size=size,
        largest=max(largest, 0.0),
        relative_floor=relative_floor,
        numerical_rank=rank,
        stable_rank=_stable_rank(values),
        below_floor_share=(size - rank) / size,
        amplification=1.0 if complete else _amplification(resolved, epsilon, exponent),
        suggested_relative_epsilon=(relative_floor if complete else float(resolved[-1]) / largest),
        suggested_relative_cutoff=relative_floor,
    )


def _relative_floor(values: Tensor, dtype: torch.dtype) -> float:
    computed = torch.promote_types(dtype, torch.float32)
    decomposition = len(values) * torch.finfo(computed).eps
    storage = 0.5 * torch.finfo(dtype).eps * math.sqrt(_stable_rank(values))
    return float(max(decomposition, storage))


def _stable_rank(values: Tensor) -> float:
    if float(values[0]) <= 0:
        return 0.0
    return float((values.clamp_min(0) / values[0]).square().sum())


def _amplification(resolved: Tensor, epsilon: float, exponent: float) -> float:
    if epsilon == 0:
        return math.inf
    return float(((resolved.median() + epsilon) / epsilon).pow(-exponent))
