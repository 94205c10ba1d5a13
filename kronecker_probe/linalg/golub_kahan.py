"""Leading singular triples by Golub-Kahan bidiagonalization, in any inner product."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
# A squared norm below this many roundings of its own terms is cancellation, not a direction.
CANCELLATION = 1e3


@dataclass(frozen=True)
class Space:
    """One side of the map: the inner product <x, y> = <metric(x), y> on float64 vectors.

    Attributes:
        metric: The Gram operator of the coordinates; None for the Euclidean inner product.
    """

    metric: Callable[[Tensor], Tensor] | None = None

    def dual(self, x: Tensor) -> Tensor:
        """metric(x)."""
        return x if self.metric is None else self.metric(x)

    def rounding(self, x: Tensor) -> float:
        """The part of <x, x> that rounding alone can produce; the metric has entries >= 0."""
        if self.metric is None:
            return 0.0
        size = x.abs()
        return CANCELLATION * EPS * float(size @ self.metric(size))


@dataclass(frozen=True)
class SingularTriples:
    """Leading singular triples of a linear map.

    Attributes:
        values: Singular values, descending, float64 [k].
        left: Coordinates of the leading left singular vector, unit norm.
        right: Coordinates of the leading right singular vector, unit norm.
        rounds: Applications of the map and of its adjoint.
        residual: |R^T u - sigma v| / sigma of the worst of the k triples.
    """

    values: Tensor
    left: Tensor
    right: Tensor
    rounds: int
    residual: float

    @property
    def leading_value(self) -> float:
        """The largest singular value; 0 for the zero map."""
        return float(self.values[0]) if len(self.values) else 0.0


def random_vector(size: int, device: torch.device) -> Tensor:
    """A fixed Gaussian vector, float64 [size]; it overlaps with every singular vector."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, dtype=torch.float64, generator=generator).to(device)


class _Basis:
    """Orthonormal vectors of a space, with their duals, growing one at a time."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.vectors: list[Tensor] = []
        self.duals: list[Tensor] = []

    def append(self, x: Tensor) -> float:
        """Orthogonalize ``x``, normalize and append it; returns its norm, 0 if nothing is left."""
        if self.vectors:
            vectors, duals = torch.stack(self.vectors), torch.stack(self.duals)
            for _ in range(2):  # twice is enough
                x = x - vectors.T @ (duals @ x)
        dual = self.space.dual(x)
        squared = float(dual @ x)
        if not squared > self.space.rounding(x):
            return 0.0
        norm = math.sqrt(squared)
        self.vectors.append(x / norm)
        self.duals.append(dual / norm)
        return norm

    def truncate(self, count: int) -> None:
        """Keep the first ``count`` vectors."""
        del self.vectors[count:], self.duals[count:]

    def combine(self, coefficients: np.ndarray) -> Tensor:
        """sum_j coefficients_j x_j."""
        vectors = torch.stack(self.vectors[: len(coefficients)])
        weights = torch.as_tensor(coefficients, dtype=vectors.dtype, device=vectors.device)
        return vectors.T @ weights


def leading_triples(
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    k: int = 1,
    left_space: Space | None = None,
    right_space: Space | None = None,
    tolerance: float = 1e-11,
    max_rounds: int = 300,
) -> SingularTriples:
    """The k leading singular triples of a linear map, with full reorthogonalization.

    Golub and Kahan (1965). After j rounds R V = U B and R^T U = V B^T + beta v e_j^T with B
    upper bidiagonal, so the residual of a triple (p, sigma, q) of B is beta |p_j|.

    Args:
        forward: Takes the *dual* of a right vector, returns the image in left coordinates.
        adjoint: Takes the *dual* of a left vector, returns the image in right coordinates.
        start: Right coordinates to start from, float64 [d]; not orthogonal to the leading one.
        k: Number of singular values.
        left_space: Inner product of the left coordinates; Euclidean by default.
        right_space: Inner product of the right coordinates; Euclidean by default.
        tolerance: Relative residual at which a triple counts as converged.
        max_rounds: Rounds after which the best triples so far are returned.

    Returns:
        The triples found: fewer than k when the map has a smaller rank, none when it is zero.
    """
    left, right = _Basis(left_space or Space()), _Basis(right_space or Space())
    if right.append(start) == 0.0:
        return SingularTriples(torch.zeros(0, dtype=torch.float64), start, start, 0, 0.0)
    alphas: list[float] = []
    betas: list[float] = []
    sigma, p, qt, residual = np.zeros(0), np.zeros((0, 0)), np.zeros((0, 0)), 0.0
    while len(alphas) < max_rounds:
        alpha = left.append(forward(right.duals[-1]))
        if alpha <= EPS * max([0.0, *alphas]):
            # R maps the last right vector into the span that is there: B gains a column only
            left.truncate(len(alphas))
            p, sigma, qt = np.linalg.svd(_bidiagonal(alphas, betas, len(alphas) + 1))
            residual = 0.0
            break
        alphas.append(alpha)
        beta = right.append(adjoint(left.duals[-1]))
        if beta <= EPS * max(alphas):
            beta = 0.0
            right.truncate(len(alphas))
        if beta > 0 and len(alphas) > 12 and len(alphas) % 4:
            betas.append(beta)
            continue
        p, sigma, qt = np.linalg.svd(_bidiagonal(alphas, betas, len(alphas)))
        wanted = min(k, len(sigma))
        residual = float((np.abs(beta * p[-1, :wanted]) / sigma[:wanted]).max())
        if len(sigma) >= k and residual <= tolerance:
            break
        if beta == 0.0 and right.append(random_vector(start.numel(), start.device)) == 0.0:
            break  # the whole space is spanned
        betas.append(beta)
    if len(sigma) == 0 or not sigma[0] > 0:
        return SingularTriples(torch.zeros(0, dtype=torch.float64), start, start, len(alphas), 0.0)
    top = sigma[:k]
    return SingularTriples(
        values=torch.from_numpy(top[top > 0].copy()),
        left=left.combine(p[:, 0]),
        right=right.combine(qt[0]),
        rounds=len(alphas),
        residual=residual,
    )


def _bidiagonal(alphas: list[float], betas: list[float], columns: int) -> np.ndarray:
    """B [j, columns] with diagonal alphas and superdiagonal betas."""
    matrix = np.zeros((len(alphas), columns))
    np.fill_diagonal(matrix, alphas)
    for i, beta in enumerate(betas[: columns - 1]):
        matrix[i, i + 1] = beta
    return matrix
