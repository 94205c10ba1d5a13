"""Polar factors, exact and as Muon approximates them."""

from __future__ import annotations

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, UnsupportedError
from kronecker_probe.linalg.precision import full_precision

# Muon (Jordan et al. 2024): the quintic a x + b x^3 + c x^5 with the steepest slope at 0 that keeps
# singular values near 1.
MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MUON_STEPS = 5


def polar(G: Tensor, *, rtol: float | None = None) -> Tensor:
    """The orthogonal polar factor U V^T of G = U S V^T, by singular value decomposition.

    It equals (G G^T)^(-1/4) G (G^T G)^(-1/4), Shampoo's update without averaging and with powers
    of pseudo-inverses: null directions map to zero, so that the factor of a zero matrix is zero,
    and that of a singular one is the partial isometry of its range. A matrix on which the solver
    fails is solved once more in float64.

    Args:
        G: [..., m, n], float32 or float64; float16 and bfloat16 are computed and returned in
            float32.
        rtol: Singular values up to rtol times the largest are null; None means max(m, n) times
            the machine epsilon of the dtype of the computation.

    Returns:
        [..., m, n]; NaN for a matrix that is not finite or has no decomposition.

    Raises:
        InvalidInputError: Not a matrix, or a negative rtol.
        UnsupportedError: The dtype is not a real floating one.
    """
    _check(G)
    if rtol is not None and not 0.0 <= rtol < 1.0:
        raise InvalidInputError(f"rtol must be at least 0 and below 1; got {rtol!r}.")
    wide = G if G.dtype == torch.float64 else G.float()
    if not G.numel():
        return wide.clone()
    with torch.no_grad(), full_precision([G.device.type]):
        flat = wide.reshape(-1, *G.shape[-2:])
        finite = flat.isfinite().flatten(1).all(1)
        flat = torch.where(finite[:, None, None], flat, 0.0)
        if rtol is None:
            rtol = max(G.shape[-2:]) * torch.finfo(wide.dtype).eps
        result = _by_svd(flat, rtol)
        failed = ~result.isfinite().flatten(1).all(1)
        if wide.dtype != torch.float64 and bool(failed.any()):
            result[failed] = _by_svd(flat[failed].double(), rtol).to(result.dtype)
        result = torch.where(finite[:, None, None], result, torch.nan)
    return result.view(G.shape)


def newton_schulz(
    G: Tensor,
    steps: int = MUON_STEPS,
    coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Muon's approximation of the polar factor: products only, the same ones for a whole batch.

    X <- a X + (b A + c A^2) X with A = X X^T, from X = G / ||G||_F. This is not the polar factor,
    nor does it converge to it: with Muon's coefficients singular values end anywhere from .7 to
    1.2, those below about 1e-3 ||G||_F less, and further steps keep them moving. Use
    :func:`polar` where equality matters.

    Args:
        G: [..., m, n].
        steps: At least 1.
        coefficients: (a, b, c).
        dtype: Of the products, bfloat16 or float32.

    Returns:
        [..., m, n] in ``dtype``; zero for a zero matrix.

    Raises:
        InvalidInputError: Not a matrix, or steps below 1.
        UnsupportedError: ``dtype`` is neither bfloat16 nor float32, or that of ``G`` is not a real
            floating one.
    """
    _check(G)
    if isinstance(steps, bool) or steps < 1:
        raise InvalidInputError(f"steps must be at least 1; got {steps!r}.")
    if dtype not in (torch.bfloat16, torch.float32):
        raise UnsupportedError(f"Newton-Schulz runs in bfloat16 or float32; got {dtype}.")
    a, b, c = coefficients
    with torch.no_grad(), full_precision([G.device.type]):
        X = _unit_norm(G if G.dtype == torch.float64 else G.float()).to(dtype)
        tall = G.shape[-2] > G.shape[-1]
        if tall:
            X = X.mT
        for _ in range(steps):
            A = X @ X.mT
            X = a * X + (b * A + c * (A @ A)) @ X
    return X.mT if tall else X


def _unit_norm(G: Tensor) -> Tensor:
    """G / ||G||_F, whatever its scale; zero stays zero."""
    if not G.numel():
        return G
    largest = G.abs().amax((-2, -1), keepdim=True)
    G = G / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.matrix_norm(G, keepdim=True)
    return G / torch.where(norm > 0, norm, 1.0)


def _by_svd(G: Tensor, rtol: float) -> Tensor:
    """Polar factors of [b, m, n]; NaN where the solver fails."""
    try:
        U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if len(G) == 1:
            return torch.full_like(G, torch.nan)
        return torch.cat([_by_svd(G[i : i + 1], rtol) for i in range(len(G))])
    kept = s > rtol * s[:, :1]
    factor: Tensor = (U * kept[:, None, :]) @ Vh
    return factor


def _check(G: Tensor) -> None:
    if not G.dtype.is_floating_point or G.dtype.itemsize < 2:
        raise UnsupportedError(
            f"Polar factors need a real floating dtype of at least 16 bits; got {G.dtype}."
        )
    if G.ndim < 2:
        raise InvalidInputError(f"Expected matrices [..., m, n]; got shape {list(G.shape)}.")
