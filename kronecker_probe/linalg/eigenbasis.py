"""Eigenbases of symmetric matrices, in descending order."""

from __future__ import annotations

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, NonFiniteError, UnsupportedError

_DTYPES = (torch.float32, torch.float64)


def eigh_descending(A: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and orthonormal eigenvectors of symmetric matrices, largest first.

    Descending order is the stable fixed point of QR iteration, so that bases kept in this order
    can be refined by it (Purifying Shampoo, arXiv 2506.03595; the ascending order of the solver
    is the unstable one). The solver is tried in the dtype of ``A``; where it fails or returns a
    non-finite number it is tried once more in float64, as Distributed Shampoo (arXiv 2309.06497)
    does.

    Args:
        A: [..., n, n], float32 or float64; only its symmetric part (A + A^T) / 2 counts.

    Returns:
        Eigenvalues [..., n], descending, and eigenvectors [..., n, n] as columns in the same
        order, in the dtype and on the device of ``A``.

    Raises:
        NonFiniteError: ``A`` holds a NaN or an infinity.
        UnsupportedError: The dtype is neither float32 nor float64.
        InvalidInputError: The matrices are not square, or the solver fails in float64 too.
    """
    _check(A)
    symmetric = A.mT.add(A).mul_(0.5)
    solved = _solve(symmetric)
    if solved is None and A.dtype != torch.float64:
        solved = _solve(symmetric.double())
    if solved is None:
        raise InvalidInputError(
            f"The symmetric eigensolver failed on a finite matrix of shape {list(A.shape)} with "
            f"entries up to {float(A.abs().max()):.3g}, in float64 too. Add a damping epsilon or "
            "rescale the matrix."
        )
    values, vectors = solved
    return values.flip(-1).to(A.dtype), vectors.flip(-1).to(A.dtype)


def _solve(A: Tensor) -> tuple[Tensor, Tensor] | None:
    """The solver's answer (ascending), or None if it failed or is not finite."""
    try:
        values, vectors = torch.linalg.eigh(A)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    finite = values.isfinite().all() & vectors.isfinite().all()
    return (values, vectors) if finite else None


def _check(A: Tensor) -> None:
    if A.dtype not in _DTYPES:
        raise UnsupportedError(
            f"Eigenvectors need float32 or float64; got {A.dtype}. Convert the matrix first."
        )
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise InvalidInputError(f"Expected square matrices [..., n, n]; got {list(A.shape)}.")
    if not A.isfinite().all():
        raise NonFiniteError(
            f"A matrix of shape {list(A.shape)} holds a NaN or an infinity, so it has no "
            "eigenvalues. Look for the step where its statistics overflowed."
        )
