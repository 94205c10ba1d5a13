"""Inverse p-th roots by coupled Newton iteration."""

from __future__ import annotations

import torch
from torch import Tensor


def newton_inverse_root(B: Tensor, p: int, max_iterations: int) -> tuple[Tensor, Tensor]:
    """B^(-1/p) of matrices with eigenvalues in (0, 1], by products only.

    Guo and Higham (2006), as in Distributed Shampoo (arXiv 2309.06497): M_0 = z B,
    X_0 = z^(1/p) I with z = (p + 1) / 2, T = ((p + 1) I - M) / p, X <- X T, M <- T^p M. A small
    eigenvalue of M grows by ((p + 1) / p)^p, that is 2 to e, per iteration. A matrix stops where
    max |M - I| <= max(10, sqrt(d)) eps, the rounding of a product, or is not finite any more (as
    for a matrix that is not positive definite); the others go on without it.

    Args:
        B: [b, d, d], symmetric, float32 or float64.
        p: A positive integer.
        max_iterations: At most this many; a matrix that reaches it keeps its last iterate.

    Returns:
        X [b, d, d] and the iterations of each matrix [b]. Whether X is a root is for the caller to
        check.
    """
    eye = torch.eye(B.shape[-1], dtype=B.dtype, device=B.device)
    z = (p + 1) / 2
    M, X = flush(z * B), (z ** (1 / p) * eye).expand_as(B)
    result = X.clone()
    iterations = torch.zeros(len(B), dtype=torch.long, device=B.device)
    active = torch.arange(len(B), device=B.device)
    goal = max(10.0, B.shape[-1] ** 0.5) * torch.finfo(B.dtype).eps
    for _ in range(max_iterations):
        T = ((p + 1) * eye - M).div_(p)
        X = X @ T
        M = flush(integer_power(T, p) @ M)
        error = (M - eye).abs().amax((-2, -1))
        result[active] = X
        iterations[active] += 1
        keep = (error > goal) & error.isfinite()
        if not keep.all():
            active, X, M = active[keep], X[keep], M[keep]
        if not len(active):
            break
    return (result + result.mT) / 2, iterations


def integer_power(T: Tensor, p: int) -> Tensor:
    """T^p of square matrices by repeated squaring, p >= 1."""
    power: Tensor | None = None
    while True:
        if p % 2:
            power = T if power is None else power @ T
        p //= 2
        if not p:
            assert power is not None
            return power
        T = T @ T


def flush(M: Tensor) -> Tensor:
    """M with entries set to 0 whose products would be subnormal, in place.

    A CPU multiplies subnormal numbers up to a hundred times slower, and an iterate of norm about 1
    loses nothing by entries below 1e-19 (float32; 1e-154 in float64).
    """
    return M.masked_fill_(M.abs() < torch.finfo(M.dtype).tiny ** 0.5, 0.0)
