"""Eigenbases that are kept while their matrix drifts: tested, and refreshed where they must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, UnsupportedError
from kronecker_probe.linalg.eigenbasis import eigh_each
from kronecker_probe.linalg.precision import full_precision


@dataclass(frozen=True)
class BasisRefresh:
    """Eigenbases of a batch of matrices after a refresh.

    Attributes:
        vectors: Q, [..., d, d], orthonormal columns; descending where refreshed.
        diagonal: diag(Q^T A Q), [..., d].
        iterations: QR iterations of each matrix, [...]; 0 for an eigendecomposition.
        share_before: :func:`off_diagonal_share` in the old basis, [...]; NaN where not tested.
        share_after: In the new basis, [...].
        refreshed: Whether the basis was replaced, [...]; if not, it is the old one bit for bit.
        ok: False where A or its old basis is not finite or the solver failed, [...]: the old basis
            is kept there.
    """

    vectors: Tensor
    diagonal: Tensor
    iterations: Tensor
    share_before: Tensor
    share_after: Tensor
    refreshed: Tensor
    ok: Tensor


def off_diagonal_share(A: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """||B - diag(B)||_F / ||B||_F of B = Q^T A Q, and diag(B).

    The share equals ||A - Q diag(B) Q^T||_F / ||A||_F: the relative error of the basis (Purifying
    Shampoo, arXiv 2506.03595). The squares of the off-diagonal entries are summed themselves: the
    difference ||B||^2 - ||diag B||^2 is noise below about 1e-3 in float32.

    Args:
        A: [..., d, d], symmetric, float32 or float64.
        Q: [..., d, d], orthonormal columns, of the same dtype.

    Returns:
        The share [...], 0 for a zero matrix and NaN where a number is not finite, and the diagonal
        [..., d].

    Raises:
        InvalidInputError: The shapes or dtypes of the two differ, or are not square matrices.
        UnsupportedError: The dtype is neither float32 nor float64.
    """
    _check(A, Q)
    with torch.no_grad(), full_precision([A.device.type]):
        return _share(A @ Q, Q)


def warm_qr(A: Tensor, Q: Tensor, tolerance: float, max_iterations: int = 1) -> BasisRefresh:
    """QR iterations from the old basis, until the off-diagonal share is within the tolerance.

    Purifying Shampoo (arXiv 2506.03595): the criterion of :func:`off_diagonal_share` is tested
    first and after each iteration, per matrix. An iteration is Q <- qr(A Q), which equals
    X = Q^T A Q = Q' R, X <- R Q', Q <- Q Q' up to the signs of columns, and does not let the basis
    drift from orthogonality over thousands of refreshes. QR iteration converges to descending
    eigenvalues, and from ascending ones it runs away from the fixed point; so the columns are
    sorted by their Rayleigh quotients, descending, before each iteration and at the end.

    Args:
        A: [..., d, d], symmetric PSD, float32 or float64.
        Q: [..., d, d], the old basis, of the same dtype.
        tolerance: At least 0 and below 1. A matrix that meets it is left alone, bit for bit.
        max_iterations: Of each matrix, at least 1.

    Raises:
        InvalidInputError: Shapes or dtypes that differ, or an argument out of range.
        UnsupportedError: The dtype is neither float32 nor float64.
    """
    if isinstance(max_iterations, bool) or max_iterations < 1:
        raise InvalidInputError(f"max_iterations must be at least 1; got {max_iterations!r}.")
    return _refresh(A, Q, tolerance, partial(_qr_iterations, max_iterations=max_iterations))


def refresh_by_eigh(A: Tensor, Q: Tensor, tolerance: float = 0.0) -> BasisRefresh:
    """A full eigendecomposition of each matrix that fails the criterion, retried in float64.

    Arguments, result and errors as in :func:`warm_qr`. With tolerance 0 every basis is replaced
    that is not exact to the last bit.
    """
    return _refresh(A, Q, tolerance, _by_eigh)


def renewed(
    A: Tensor, Q: Tensor, iterations: int | None, *, quotients: bool = True
) -> BasisRefresh:
    """New bases without a test, at about half of the products.

    Args:
        A: [..., d, d], symmetric PSD, float32 or float64.
        Q: [..., d, d], the old basis, of the same dtype.
        iterations: QR iterations from it, as in :func:`warm_qr`; None for an eigendecomposition.
        quotients: Whether ``diagonal`` and the order of columns are those of the new basis. If not,
            QR iterations take one product less: the diagonal is that of R, which converges to it,
            and columns keep the order that the quotients of the old basis gave them.

    Returns:
        As :func:`warm_qr`, with shares that are NaN.

    Raises:
        InvalidInputError: The shapes or dtypes of the two differ, or are not square matrices.
        UnsupportedError: The dtype is neither float32 nor float64.
    """
    _check(A, Q)
    batch, d = A.shape[:-2], A.shape[-1]
    with torch.no_grad(), full_precision([A.device.type]):
        H, held = A.reshape(-1, d, d), Q.reshape(-1, d, d)
        ok = (H.sum((1, 2)) + held.sum((1, 2))).isfinite()
        vectors, diagonal = held.clone(), torch.full_like(held[..., 0], math.nan)
        if bool(ok.any()):
            if iterations is None:
                values, found, solved = eigh_each(H[ok])
            else:
                values, found = _untested_qr(H[ok], held[ok], iterations, quotients)
                solved = found.sum((1, 2)).isfinite()
            rows = ok.nonzero()[:, 0]
            ok[rows] = solved
            vectors[rows[solved]], diagonal[rows[solved]] = found[solved], values[solved]
        counts = torch.full_like(ok, iterations or 0, dtype=torch.long)
        untested = torch.full_like(diagonal[:, 0], math.nan)
    return BasisRefresh(
        vectors.view(A.shape),
        diagonal.view(A.shape[:-1]),
        *(part.view(batch) for part in (counts, untested, untested, ok, ok)),
    )


def _untested_qr(H: Tensor, Q: Tensor, iterations: int, quotients: bool) -> tuple[Tensor, Tensor]:
    """Rayleigh quotients, descending, and the bases."""
    image = H @ Q
    diagonal = (Q * image).sum(-2)
    for iteration in range(1, iterations + 1):
        Q, R = torch.linalg.qr(_sorted_columns(image, diagonal))
        if iteration == iterations and not quotients:
            return R.diagonal(dim1=-2, dim2=-1).abs(), Q
        image = H @ Q
        diagonal = (Q * image).sum(-2)
    return diagonal.sort(dim=-1, descending=True, stable=True)[0], _sorted_columns(Q, diagonal)


# From A, A Q, diag(Q^T A Q) and the tolerance: new bases, iterations, shares and diagonals.
_Replaced = tuple[Tensor, Tensor, Tensor, Tensor]
_Replace = Callable[[Tensor, Tensor, Tensor, float], _Replaced]


def _refresh(A: Tensor, Q: Tensor, tolerance: float, replace: _Replace) -> BasisRefresh:
    _check(A, Q)
    if not 0.0 <= tolerance < 1.0:
        raise InvalidInputError(f"tolerance must be at least 0 and below 1; got {tolerance!r}.")
    batch, d = A.shape[:-2], A.shape[-1]
    with torch.no_grad(), full_precision([A.device.type]):
        H, held = A.reshape(-1, d, d), Q.reshape(-1, d, d)
        image = H @ held
        before, diagonal = _share(image, held)
        vectors, after = held.clone(), before.clone()
        iterations = torch.zeros(len(H), dtype=torch.long, device=A.device)
        refreshed, ok = torch.zeros_like(before, dtype=torch.bool), before.isfinite()
        rows = (before > tolerance).nonzero()[:, 0]
        if len(rows):
            found, counts, share, values = replace(H[rows], image[rows], diagonal[rows], tolerance)
            good = share.isfinite()
            ok[rows] = good
            rows, found = rows[good], found[good]
            vectors[rows], iterations[rows] = found, counts[good]
            after[rows], diagonal[rows] = share[good], values[good]
            refreshed[rows] = True
    return BasisRefresh(
        vectors.view(A.shape),
        diagonal.view(A.shape[:-1]),
        *(part.view(batch) for part in (iterations, before, after, refreshed, ok)),
    )


def _qr_iterations(
    H: Tensor, image: Tensor, diagonal: Tensor, tolerance: float, *, max_iterations: int
) -> _Replaced:
    bases, shares, diagonals = torch.empty_like(H), torch.empty_like(H[:, 0, 0]), diagonal.clone()
    counts = torch.zeros(len(H), dtype=torch.long, device=H.device)
    active = torch.arange(len(H), device=H.device)
    for iteration in range(1, max_iterations + 1):
        Q = torch.linalg.qr(_sorted_columns(image, diagonal))[0]
        image = H @ Q  # for the test, and for the next iteration
        share, diagonal = _share(image, Q)
        bases[active] = _sorted_columns(Q, diagonal)
        diagonals[active] = diagonal.sort(dim=-1, descending=True, stable=True)[0]
        shares[active], counts[active] = share, iteration
        keep = share > tolerance
        if not keep.all():
            active, H, image, diagonal = active[keep], H[keep], image[keep], diagonal[keep]
        if not len(active):
            break
    return bases, counts, shares, diagonals


def _by_eigh(H: Tensor, image: Tensor, diagonal: Tensor, tolerance: float) -> _Replaced:
    bases = eigh_each((H + H.mT) / 2)[1]
    counts = torch.zeros(len(H), dtype=torch.long, device=H.device)
    return bases, counts, *_share(H @ bases, bases)


def _sorted_columns(columns: Tensor, diagonal: Tensor) -> Tensor:
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    return columns.gather(-1, order[..., None, :].expand_as(columns))


def _share(image: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """The off-diagonal share and the diagonal of B = Q^T A Q, from A Q and Q."""
    B = Q.mT @ image
    diagonal = B.diagonal(dim1=-2, dim2=-1).clone()
    largest = B.abs().amax((-2, -1)).clamp_min(torch.finfo(B.dtype).tiny)
    B /= largest[..., None, None]  # squares neither overflow nor vanish
    scaled = B.diagonal(dim1=-2, dim2=-1)
    on = torch.linalg.vector_norm(scaled, dim=-1)
    scaled.zero_()
    off = torch.linalg.vector_norm(B, dim=(-2, -1))
    total = torch.hypot(off, on)
    share = off / torch.where(total == 0, 1.0, total)
    return torch.where(diagonal.isfinite().all(-1), share, math.nan), diagonal


def _check(A: Tensor, Q: Tensor) -> None:
    square = A.ndim >= 2 and A.shape[-1] == A.shape[-2] > 0
    if not square or A.shape != Q.shape or A.dtype != Q.dtype:
        raise InvalidInputError(
            "A matrix and its basis must be square, [..., d, d], of one shape and dtype; got "
            f"{list(A.shape)} {A.dtype} and {list(Q.shape)} {Q.dtype}."
        )
    if A.dtype not in (torch.float32, torch.float64):
        raise UnsupportedError(
            f"Eigenbases need float32 or float64; got {A.dtype}. Convert the matrix first."
        )
