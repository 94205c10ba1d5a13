"""When the KL product (q = 0) exists: the matrix normal needs enough gradient samples.

A minimizer exists and is unique where the samples are stable: G_i Y within X for all i only for
subspaces with dim X / m > dim Y / n (Derksen and Makam, 2021, arXiv 2007.10206; m and n stand for
the ranks of L and R). That is checked in three ways: by counting, before anything is computed; by
factors that lose rank, during the iteration; and by the second singular value of the whitened
R(H), which is the first one where minimizers are many.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kronecker_probe.approximations.half_steps import HalfSteps
from kronecker_probe.errors import UnsupportedError
from kronecker_probe.gradients.samples.base import FactoredSamples, GradientSamples
from kronecker_probe.linalg.golub_kahan import LinearMap, leading_triples

# Whitened factors with a smaller ratio of eigenvalues are on their way to a singular matrix.
SMALLEST_RATIO = 1e-12
# sigma_2 / sigma_1 of the whitened R(H) from which minimizers count as many.
UNIQUE = 1.0 - 1e-6
# Relative residuals of sigma_2 in a first and in a second solve, and the share of sigma_1 below
# which the first is enough.
ROUGH, FINE, CLEAR = 0.1, 1e-2, 0.9


def no_minimizer(samples: GradientSamples, ranks: tuple[int, int], why: str) -> UnsupportedError:
    """The refusal of q = 0, with the numbers that decide it."""
    m, n = samples.shape
    draws = int((samples.weights > 0).sum())
    columns = "" if samples.n_columns == 1 else f" of C={samples.n_columns} columns"
    return UnsupportedError(
        f"divergence with q=0 (KL): {why}. There are N={draws} samples{columns} of an m x n = "
        f"{m} x {n} matrix, whose factors have ranks {ranks[0]} and {ranks[1]}. Use more samples, "
        "or q > 0, which has a minimizer for any gradient samples (q=1/2, or q=1)."
    )


def check_enough_draws(samples: GradientSamples, ranks: tuple[int, int]) -> None:
    """Refuse what counting alone rules out.

    Raises:
        UnsupportedError: Too few gradient samples for a unique minimizer.
    """
    (m, n), positions = ranks, samples.n_positions
    draws = int((samples.weights > 0).sum())
    count = draws * samples.n_columns
    # stable samples are an open set of dimension m^2 + n^2 - 1 at most, so the generic count binds
    excess = m * m + n * n - count * m * n
    if excess > 1 or (excess == 0 and math.gcd(m, n) > 1):
        raise no_minimizer(
            samples,
            ranks,
            "too few samples for a unique minimizer, which needs m^2 + n^2 - N C m n <= 1 (and "
            "not 0 where m and n share a divisor), and for the ranks of the factors it is "
            f"{excess}",
        )
    if not isinstance(samples, FactoredSamples) or positions is None:
        return
    for ignored in range(1, draws):
        # inputs orthogonal to all those of ``ignored`` samples only meet the others' outputs
        free, met = n - ignored * positions, (draws - ignored) * samples.n_columns * positions
        if free > 0 and met < m and m * free >= n * met:
            raise no_minimizer(
                samples,
                ranks,
                f"too few samples for a unique minimizer: {free} of {n} dimensions of inputs meet "
                f"only {met} of {m} dimensions of output gradients, and a larger share is needed",
            )


def cholesky(matrix: Tensor) -> Tensor:
    """The Cholesky factor of a whitened PSD matrix.

    Raises:
        LinAlgError: It is singular or nearly so.
    """
    factor: Tensor = torch.linalg.cholesky(matrix)
    diagonal = factor.diagonal()
    if float(diagonal.min() / diagonal.max()) ** 2 < SMALLEST_RATIO:
        raise torch.linalg.LinAlgError("nearly singular")  # type: ignore[attr-defined]
    return factor


def check_unique(samples: GradientSamples, steps: HalfSteps, left: Tensor, right: Tensor) -> None:
    """Refuse one of many minimizers.

    Whitened by a minimizer, R(H) takes I to I with its largest singular value, and the minimizer
    is unique where all others are smaller.

    Args:
        samples: The gradient samples.
        steps: Their half steps.
        left: L of a minimizer.
        right: R of it.

    Raises:
        UnsupportedError: There are others.
    """
    dtype = torch.float32 if steps.single else torch.float64
    roots: list[Tensor] = [torch.linalg.inv(cholesky(matrix)).to(dtype) for matrix in (left, right)]
    sizes = [len(root) for root in roots]

    def forward(v: Tensor) -> Tensor:
        whitened = roots[1].T @ v.view(sizes[1], sizes[1]) @ roots[1]
        image: Tensor = roots[0] @ steps.left(whitened).reduced.to(dtype) @ roots[0].T
        return image.reshape(-1)

    def adjoint(u: Tensor) -> Tensor:
        whitened = roots[0].T @ u.view(sizes[0], sizes[0]) @ roots[0]
        image: Tensor = roots[1] @ steps.right(whitened).reduced.to(dtype) @ roots[1].T
        return image.reshape(-1)

    ones = [torch.eye(k, dtype=dtype, device=left.device).reshape(-1) for k in sizes]
    first = float(forward(ones[1]) @ ones[0]) / math.sqrt(sizes[0] * sizes[1])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(sizes[1], sizes[1], dtype=torch.float64, generator=generator)
    noise = (noise + noise.T).to(left.device, dtype).reshape(-1)
    start = noise - (noise @ ones[1]) / sizes[1] * ones[1]
    for tolerance in (ROUGH, FINE):
        found = leading_triples(
            LinearMap(forward, adjoint),
            start,
            locked=([ones[0] / math.sqrt(sizes[0])], [ones[1] / math.sqrt(sizes[1])]),
            negligible=1e-9 * first,
            tolerance=tolerance,
            max_rounds=60,
        )
        # far from one, a rough value is enough: its error is of the order of its residual squared
        if found.leading_value < CLEAR * first:
            return
    if found.leading_value >= UNIQUE * first:
        raise no_minimizer(samples, steps.ranks, "its minimizers form a continuum")
