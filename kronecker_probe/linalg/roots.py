"""Powers of symmetric positive semidefinite matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, NonFiniteError
from kronecker_probe.linalg.eigenbasis import eigh_descending


def psd_power(A: Tensor, p: float, epsilon: float = 0.0, *, rtol: float | None = None) -> Tensor:
    """(A + epsilon I)^p of symmetric positive semidefinite matrices, by eigendecomposition.

    Rule for the spectrum: eigenvalues below zero, which a PSD matrix has by rounding only, are
    set to zero; then epsilon is added. Setting them to zero is never farther from the true
    spectrum than the solver already is, whereas the shift by -min(lambda_min, 0) of Distributed
    Shampoo (arXiv 2309.06497) moves every eigenvalue. For p < 0 and epsilon = 0 the power is that
    of the pseudo-inverse: directions with lambda <= rtol * lambda_max are null, and map to zero.
    With epsilon > 0 no direction is null. 0^0 = 1: p = 0 gives the identity.

    Args:
        A: [..., n, n], float32 or float64; only its symmetric part counts.
        p: Any finite real power.
        epsilon: Damping, >= 0, in the units of ``A``.
        rtol: Null directions of the pseudo-inverse, relative to the largest eigenvalue; None
            means n times the machine epsilon of the dtype of ``A``.

    Returns:
        [..., n, n] in the dtype and on the device of ``A``.

    Raises:
        NonFiniteError: ``A`` is not finite, or the power overflows the dtype.
        UnsupportedError: The dtype is neither float32 nor float64.
        InvalidInputError: The matrices are not square, epsilon is negative, or the eigensolver
            fails in float64 too.
    """
    if not 0.0 <= epsilon < float("inf"):
        raise InvalidInputError(f"epsilon must be finite and at least 0; got {epsilon!r}.")
    values, vectors = eigh_descending(A)
    powered = _spectrum_power(values, p, epsilon, rtol)
    # Both sides get half of the power: the product is PSD by construction.
    half = vectors * powered.sqrt().unsqueeze(-2)
    result = half @ half.mT
    if not result.isfinite().all():
        top = float(values.max()) if values.numel() else 0.0
        raise NonFiniteError(
            f"The power {p:g} of a matrix with largest eigenvalue {top:.3g} (epsilon "
            f"{epsilon:g}) overflows {A.dtype}. Raise epsilon or use float64."
        )
    return result


def _spectrum_power(values: Tensor, p: float, epsilon: float, rtol: float | None) -> Tensor:
    damped = values.clamp_min(0).add_(epsilon)
    if p >= 0 or epsilon > 0:
        return damped.pow(p)
    if rtol is None:
        rtol = values.shape[-1] * torch.finfo(values.dtype).eps
    null = damped <= rtol * damped[..., :1]
    return damped.masked_fill(null, 1).pow(p).masked_fill(null, 0)
