"""Inverse p-th roots by coupled iteration with minimax polynomials."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from kronecker_probe.linalg.newton import flush, integer_power

# Most exchanges of the Remez algorithm; it takes three to five.
_EXCHANGES = 60

# The optimal polynomial of a long interval maps large eigenvalues to nearly 0 again, where float32
# loses their digits. Fitting to no more than [c, 1] of an interval, c = max(.2^p, .002), keeps them
# and costs an iteration at most (measured for p from 1 to 8 and condition numbers up to 1e8).
_CUSHION_ROOT, _CUSHION = 0.2, 2e-3


def minimax_inverse_root(B: Tensor, p: int, lower: float) -> tuple[Tensor, int]:
    """B^(-1/p) of matrices with eigenvalues in [lower, 1], by products only.

    X <- X T(M), M <- T(M)^ceil(p/2) M T(M)^floor(p/2) with quadratic T: the coupled Newton
    iteration, whose T is the tangent of m^(-1/p) at 1, with that T which minimizes the largest
    |m^(1/p) T(m) - 1| over the interval that still holds the eigenvalues of M. For p = 2 this is
    the sign iteration of Polar Express (arXiv 2505.16932), coupled as Denman and Beavers do. Small
    eigenvalues grow about tenfold in an iteration, against 2 to e times for Newton. The
    polynomials follow from ``lower`` alone: all matrices of a batch take the same products, and
    the device never waits for the host.

    Args:
        B: [..., d, d], symmetric, float32 or float64.
        p: A positive integer.
        lower: A lower bound of the eigenvalues in (0, 1]; smaller ones are raised, not finished.

    Returns:
        X [..., d, d] and the number of iterations. Whether X is a root is for the caller to check.
    """
    M = flush(B.clone())
    X: Tensor | None = None
    eye = torch.eye(B.shape[-1], dtype=B.dtype, device=B.device)
    polynomials = minimax_schedule(p, _rounded_down(lower), torch.finfo(B.dtype).eps)
    for step, (a, b, c) in enumerate(polynomials):
        T = torch.matmul(M, M).mul_(c).add_(M, alpha=b).add_(eye, alpha=a)
        X = T if X is None else X @ T
        if step + 1 < len(polynomials):
            M = flush(_both_sides(T, p, M))
    assert X is not None
    return (X + X.mT) / 2, len(polynomials)


def _both_sides(T: Tensor, p: int, M: Tensor) -> Tensor:
    """T^p M as a product that stays symmetric: rounding grows by the root of what it does in T^p M.

    At no more products: 1, 2, 3, 3 for p = 1 to 4.
    """
    if p == 1:
        return T @ M
    right = integer_power(T, p // 2)
    left = right @ T if p % 2 else right
    return left @ M @ right


@functools.lru_cache(maxsize=256)
def minimax_schedule(p: int, lower: float, goal: float) -> tuple[tuple[float, float, float], ...]:
    """The polynomials a + b m + c m^2 of the iterations that bring [lower, 1] to 1.

    Args:
        p: A positive integer.
        lower: In (0, 1].
        goal: The last |m^(1/p) T(m) - 1| is at most this.
    """
    schedule, upper = [], 1.0
    while True:
        fitted = max(lower, max(_CUSHION_ROOT**p, _CUSHION) * upper)
        (a, b, c), error = minimax_polynomial(p, fitted, upper)
        schedule.append((a, b, c))
        if fitted == lower and error <= goal:
            return tuple(schedule)
        # below the fitted interval m^(1/p) T(m) rises with m
        least = min(lower ** (1 / p) * (a + b * lower + c * lower * lower), 1 - error)
        lower, upper = least**p, (1 + error) ** p


def minimax_polynomial(
    p: int, lower: float, upper: float
) -> tuple[tuple[float, float, float], float]:
    """The quadratic T with the least E = max |m^(1/p) T(m) - 1| on [lower, upper], and E.

    By Remez exchange: m^(1/p) T(m) lies in a Chebyshev system, so that the best T alternates at
    both ends and at the two interior extrema, which are the roots of a quadratic.

    Args:
        p: A positive integer.
        lower: Positive.
        upper: Above ``lower``, of the order of 1.
    """
    if upper - lower < 1e-3 * upper:  # Taylor's T is as good, and the exchange loses its digits
        return _taylor(p, lower, upper)
    points = torch.tensor(_first_points(lower, upper), dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    ones = torch.ones_like(points)
    for _ in range(_EXCHANGES):
        columns = [points ** (1 / p + k) for k in range(3)]
        a, b, c, error = torch.linalg.solve(torch.stack([*columns, signs], 1), ones).tolist()
        q2, q1, q0 = (1 / p + 2) * c, (1 / p + 1) * b, a / p
        half = -0.5 * (q1 - math.sqrt(max(q1 * q1 - 4 * q2 * q0, 0.0)))
        moved = torch.tensor([lower, q0 / half, half / q2, upper], dtype=torch.float64)
        done = float((moved - points).abs().max()) <= 1e-9 * upper
        points = moved
        if done:
            break
    return (a, b, c), abs(error)


def _first_points(lower: float, upper: float) -> tuple[float, float, float, float]:
    if lower > upper / 8:
        return lower, (3 * lower + upper) / 4, (lower + 3 * upper) / 4, upper
    return lower, max(0.15 * upper, 1.1 * lower), 0.65 * upper, upper


def _taylor(p: int, lower: float, upper: float) -> tuple[tuple[float, float, float], float]:
    """The expansion of m^(-1/p) about the middle of the interval, and its error at the ends."""
    s, mid = 1 / p, (lower + upper) / 2
    first, second = -s, s * (s + 1) / 2  # of (1 + x)^(-s)
    f = mid**-s
    a, b, c = f * (1 - first + second), f * (first - 2 * second) / mid, f * second / mid**2
    error = max(abs(m**s * (a + b * m + c * m * m) - 1) for m in (lower, upper))
    return (a, b, c), error


def _rounded_down(lower: float) -> float:
    """The next power of 2 at or below, so that few schedules are ever computed."""
    return 2.0 ** math.floor(math.log2(lower))
