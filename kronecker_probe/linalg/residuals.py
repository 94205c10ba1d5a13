"""How well a matrix is an inverse root of another, computed from the two alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kronecker_probe.linalg.damping import probes

# Probe vectors of the norm of a residual; sizes up to this get the exact norm.
PROBES = 16

Apply = Callable[[Tensor], Tensor]


def root_residual(apply: Apply, X: Tensor, p: float) -> Tensor:
    """||X^floor(p/2) A X^ceil(p/2) - I||_F / sqrt(d) of X = A^(-1/p), in float64.

    It is formed from A and X, not from the iteration that made X (whose own convergence measure
    can be small while X is far off: a drifting coupled iteration, or a solver's backward error
    amplified by a small epsilon). The product has the eigenvalues of X^p A, hence an eigenvalue x
    of X that is off by a relative delta adds p delta, the directions of small and of large
    eigenvalues alike. The powers stand on both sides because rounding X to eps adds
    eps kappa^(1/2) here (p even; eps kappa^(2/3) at p = 3, eps kappa at p = 1) and eps kappa in
    X^p A.

    The Frobenius norm is exact for d <= 16. Above, it is estimated from 16 fixed Gaussian vectors:
    unbiased in the square, whose relative standard deviation is at most sqrt(2 / 16) = .35 (a
    residual of rank one) and far less for a residual spread over directions.

    Args:
        apply: Z -> A Z for float64 [..., d, k].
        X: [..., d, d], symmetric.
        p: At least 1. For p that is not an integer, X^(p/2) is taken by a float64
            eigendecomposition of X.

    Returns:
        [...], float64; infinite where anything is not finite.
    """
    d = X.shape[-1]
    finite = X.isfinite().flatten(-2).all(-1)
    wide = torch.where(finite[..., None, None], X, 0.0).double()
    Z = probes(d, PROBES, wide)
    if p == round(p):
        right, left = math.ceil(p / 2), math.floor(p / 2)
    else:
        wide, right, left = _power(wide, p / 2), 1, 1
    Y = Z.expand(*X.shape[:-1], -1)
    for _ in range(right):
        Y = wide @ Y
    Y = apply(Y)
    for _ in range(left):
        Y = wide @ Y
    norm = torch.linalg.matrix_norm(Y - Z) / math.sqrt(Z.numel() if d > PROBES else d)
    return torch.where(finite & norm.isfinite(), norm, math.inf)


def _power(X: Tensor, p: float) -> Tensor:
    values, vectors = torch.linalg.eigh(X)
    power: Tensor = (vectors * values.clamp_min(0).pow(p).unsqueeze(-2)) @ vectors.mT
    return power
