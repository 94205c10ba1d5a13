"""Eigenbases of symmetric matrices, in descending order."""

from __future__ import annotations

import math

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
    values, vectors, solved = eigh_each(symmetric.view(-1, *A.shape[-2:]))
    if not solved.all():
        raise InvalidInputError(
            f"The symmetric eigensolver failed on a finite matrix of shape {list(A.shape)} with "
            f"entries up to {float(A.abs().max()):.3g}, in float64 too. Add a damping epsilon or "
            "rescale the matrix."
        )
    return values.view(A.shape[:-1]), vectors.view(A.shape)


def eigh_each(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Descending eigenpairs of each matrix of a batch; one that fails leaves the others alone.

    The batch is solved in its own dtype, matrix by matrix if the batch as a whole raises; those
    without a finite answer are solved once more in float64.

    Args:
        A: [b, n, n], symmetric and finite, float32 or float64.

    Returns:
        Eigenvalues [b, n], eigenvectors [b, n, n] as columns, and whether each matrix was solved
        [b]; the pairs of one that was not are NaN.
    """
    values, vectors = _solve(A)
    solved = _finite(values, vectors)
    if A.dtype != torch.float64 and not bool(solved.all()):
        rows = (~solved).nonzero()[:, 0]
        again = _solve(A[rows].double())
        values[rows], vectors[rows] = again[0].to(A.dtype), again[1].to(A.dtype)
        solved = _finite(values, vectors)
    return values.flip(-1), vectors.flip(-1), solved


def _solve(A: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenpairs of [b, n, n]; NaN where the solver raises."""
    try:
        values, vectors = torch.linalg.eigh(A)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if len(A) == 1:
            return torch.full_like(A[..., 0], math.nan), torch.full_like(A, math.nan)
        each = [_solve(A[i : i + 1]) for i in range(len(A))]
        return torch.cat([pair[0] for pair in each]), torch.cat([pair[1] for pair in each])
    return values, vectors


def _finite(values: Tensor, vectors: Tensor) -> Tensor:
    return values.isfinite().all(-1) & vectors.isfinite().flatten(1).all(-1)


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
