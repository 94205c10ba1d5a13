"""Leading singular triples by Golub-Kahan bidiagonalization, in any inner product."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
# A squared norm below this many roundings of its own terms is cancellation, not a direction.
CANCELLATION = 1e3
# A new direction below this many roundings of the largest singular value is rounding itself.
BREAKDOWN = 64
# A singular value of a locked complement below this share of the largest is what locking left.
LOCKING = 1e-11
# Relative residual at which a triple counts as converged.
CONVERGED = 1e-11
# Relative residual at which a search for what a solve may have missed is given up.
PROBED = 1e-6
# Relative residual above which listed singular values carry a warning.
UNCONVERGED = 1e-6
# Vectors for which a basis makes room at first.
ROOM = 24

Map: TypeAlias = Callable[[Tensor], Tensor]


class Space:
    """One side of the map: the inner product <x, y> = <K x, y> on float64 vectors.

    Args:
        gram: K, float64 [d, d], PSD with entries >= 0; None for the Euclidean inner product.
    """

    def __init__(self, gram: Tensor | None = None) -> None:
        self.gram = gram
        self.trace = 0.0 if gram is None else float(gram.diagonal().sum())

    def dual(self, x: Tensor) -> Tensor:
        """K x."""
        return x if self.gram is None else self.gram.mv(x)

    def is_rounding(self, squared: float, x: Tensor) -> bool:
        """Whether <x, x> = ``squared`` could be produced by rounding alone."""
        if self.gram is None:
            return False
        bound = CANCELLATION * EPS
        if squared > bound * self.trace * float(x @ x):  # at least |x|^T K |x|
            return False
        size = x.abs()
        return squared <= bound * float(size @ self.gram.mv(size))


@dataclass(frozen=True)
class SingularTriples:
    """Leading singular triples of a linear map, j of them; j = 0 for the zero map.

    Attributes:
        values: Singular values, descending, float64 CPU [j].
        left: Coordinates of the left singular vectors, unit norm, [d, j].
        right: Coordinates of the right singular vectors, unit norm, [d', j].
        rounds: Applications of the map and of its adjoint.
        residual: |R^T u - sigma v| / sigma of the worst of the triples.
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


class _Basis:
    """Orthonormal vectors of a space, with their duals, growing one at a time."""

    def __init__(self, space: Space, locked: Sequence[Tensor]) -> None:
        self.space = space
        self.locked = self.count = len(locked)
        self._vectors = torch.stack([*locked]) if locked else torch.empty(0, 0)
        # in Euclidean space a vector is its own dual, and is kept once
        self._separate = space.gram is not None
        self._duals = self._vectors
        if locked and self._separate:
            self._duals = torch.stack([space.dual(x) for x in locked])

    @property
    def last_dual(self) -> Tensor:
        """The dual of the last vector."""
        return self._duals[self.count - 1]

    def append(self, x: Tensor) -> float:
        """Orthogonalize ``x``, normalize and append it; returns its norm, 0 if nothing is left."""
        if self.count:
            vectors, duals = self._vectors[: self.count], self._duals[: self.count]
            for _ in range(2):  # twice is enough
                x = x - (duals @ x) @ vectors
        dual = self.space.dual(x)
        squared = float(dual @ x)
        if not squared > 0 or self.space.is_rounding(squared, x):
            return 0.0
        norm = math.sqrt(squared)
        self._make_room(x)
        torch.div(x, norm, out=self._vectors[self.count])
        if self._separate:
            torch.div(dual, norm, out=self._duals[self.count])
        self.count += 1
        return norm

    def _make_room(self, like: Tensor) -> None:
        if self.count < len(self._vectors):
            return
        room = max(ROOM, self.count)  # untouched memory costs nothing yet
        self._vectors = self._grown(self._vectors, like, room)
        self._duals = self._grown(self._duals, like, room) if self._separate else self._vectors

    def _grown(self, held: Tensor, like: Tensor, room: int) -> Tensor:
        out = like.new_empty(self.count + room, len(like))
        if self.count:
            out[: self.count] = held[: self.count]
        return out

    def pop(self) -> None:
        """Drop the last vector."""
        self.count -= 1

    def combine(self, coefficients: np.ndarray) -> Tensor:
        """sum_j coefficients_jk x_j over the vectors that are not locked, [d, k]."""
        used = self._vectors[self.locked : self.locked + len(coefficients)]
        return used.T @ torch.as_tensor(coefficients, dtype=used.dtype, device=used.device)


@dataclass(frozen=True)
class LinearMap:
    """A linear map between two spaces.

    Attributes:
        forward: Takes the *dual* of a right vector, returns the image in left coordinates.
        adjoint: Takes the *dual* of a left vector, returns the image in right coordinates.
        left: Inner product of the left coordinates; Euclidean by default.
        right: Inner product of the right coordinates; Euclidean by default.
    """

    forward: Map
    adjoint: Map
    left: Space = field(default_factory=Space)
    right: Space = field(default_factory=Space)


def leading_triples(
    linear: LinearMap,
    start: Tensor,
    *,
    k: int = 1,
    locked: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ()),
    negligible: float = 0.0,
    tolerance: float = CONVERGED,
    max_rounds: int = 300,
    image: Tensor | None = None,
) -> SingularTriples:
    """The k leading singular triples of a linear map, with full reorthogonalization.

    Golub and Kahan (1965). After j rounds R V = U B and R^T U = V B^T + beta v e_j^T with B
    upper bidiagonal, so the residual of a triple (p, sigma, q) of B is beta |p_j|.

    Args:
        linear: R.
        start: Right coordinates to start from, float64 or float32 [d']; what is orthogonal to
            it, and of repeated singular values all but one copy, is not found.
        k: Number of singular values.
        locked: Left and right singular vectors to stay orthogonal to.
        negligible: Size at which an image counts as zero.
        tolerance: Relative residual at which a triple counts as converged.
        max_rounds: Rounds after which the best triples so far are returned.
        image: The image of ``start`` where it is known, in left coordinates.

    Returns:
        The triples found: fewer than k when the space that ``start`` generates is smaller.
    """
    left, right = _Basis(linear.left, locked[0]), _Basis(linear.right, locked[1])
    largest = float(start.abs().max()) if len(start) else 0.0
    scale = right.append(start / largest) * largest if largest > 0 else 0.0
    first = None if locked[1] or image is None or not scale > 0 else image / scale
    solved, rounds = _bidiagonalized(
        linear, left, right, k, negligible, tolerance, max_rounds if scale > 0 else 0, first
    )
    found = int((solved.sigma[:k] > 0).sum())
    if found == 0:
        void = start.new_zeros(len(start), 0)
        return SingularTriples(torch.zeros(0, dtype=torch.float64), void, void, 0, 0.0)
    return SingularTriples(
        values=torch.from_numpy(solved.sigma[:found].copy()),
        left=left.combine(solved.p[:, :found]),
        right=right.combine(solved.qt[:found].T),
        rounds=rounds,
        residual=solved.residual,
    )


class _Solved(NamedTuple):
    """B = P diag(sigma) Q^T, and the worst residual of the triples that are wanted."""

    p: np.ndarray
    sigma: np.ndarray
    qt: np.ndarray
    residual: float


def _bidiagonalized(
    linear: LinearMap,
    left: _Basis,
    right: _Basis,
    k: int,
    negligible: float,
    tolerance: float,
    max_rounds: int,
    image: Tensor | None,
) -> tuple[_Solved, int]:
    """The decomposition of B after the rounds that k triples need, and the number of rounds."""
    alphas: list[float] = []
    betas: list[float] = []
    solved = _Solved(np.zeros((0, 0)), np.zeros(0), np.zeros((0, 0)), 0.0)
    alive = max_rounds > 0
    breakdown = BREAKDOWN * torch.finfo(right.last_dual.dtype).eps if alive else 0.0
    while alive and len(alphas) < max_rounds:
        known = None if alphas else image
        alpha = left.append(linear.forward(right.last_dual) if known is None else known)
        if alpha <= max([negligible, *(breakdown * other for other in alphas)]):
            # the last right vector maps into the span that is there: B gains a column only
            if alpha > 0:
                left.pop()
            svd = np.linalg.svd(_bidiagonal(alphas, betas, len(alphas) + 1))
            return _Solved(*svd, 0.0), len(alphas)
        alphas.append(alpha)
        beta = right.append(linear.adjoint(left.last_dual))
        alive = beta > breakdown * max(alphas)
        if not alive or len(alphas) <= 12 or len(alphas) % 4 == 0 or len(alphas) == max_rounds:
            p, sigma, qt = np.linalg.svd(_bidiagonal(alphas, betas, len(alphas)))
            wanted = min(k, len(sigma))
            rest = beta if alive else 0.0
            residual = float((np.abs(rest * p[-1, :wanted]) / sigma[:wanted]).max())
            solved = _Solved(p, sigma, qt, residual)
            if len(sigma) >= k and residual <= tolerance:
                break
        betas.append(beta)
    return solved, len(alphas)


def repeated_triples(
    linear: LinearMap, draw: Callable[[torch.Generator], Tensor], k: int, floor: float = 0.0
) -> SingularTriples:
    """The triples of the k largest singular values, repeated ones as often as they occur.

    A Lanczos solve sees one copy of a repeated value. So what was found is locked and the solve
    repeated in its complement, until the complement holds nothing larger than the k-th.

    Args:
        linear: The map.
        draw: Random right coordinates to start from.
        k: How many.
        floor: Values up to this one are of no interest.

    Returns:
        j triples, descending; j < k only where the map has a smaller rank, or where the rest is
        below ``floor``.
    """
    generator = torch.Generator().manual_seed(0)
    values: list[float] = []
    locked: tuple[list[Tensor], list[Tensor]] = ([], [])
    rounds, residual = 0, 0.0
    while True:
        kth = sorted(values, reverse=True)[k - 1] if len(values) >= k else 0.0
        enough = max(floor, kth)
        negligible = LOCKING * max([floor, *values])

        def solve(wanted: int, tolerance: float, negligible: float = negligible) -> SingularTriples:
            start = draw(generator)
            start = start / torch.linalg.vector_norm(start)
            return leading_triples(
                linear, start, k=wanted, locked=locked, negligible=negligible, tolerance=tolerance
            )

        if enough > 0 and solve(1, PROBED).leading_value <= enough + negligible:
            break
        found = solve(max(1, k - len(values)), CONVERGED)
        _warn_unconverged(found)
        if found.leading_value <= enough + negligible:
            break
        locked[0].extend(found.left.T)
        locked[1].extend(found.right.T)
        values.extend(found.values.tolist())
        rounds, residual = rounds + found.rounds, max(residual, found.residual)
    order = [i for i in np.argsort(values)[::-1][:k].tolist() if values[i] > floor]
    kept = torch.tensor([values[i] for i in order], dtype=torch.float64)
    left, right = (_stacked(vectors, order) for vectors in locked)
    return SingularTriples(kept, left, right, rounds, residual)


def _warn_unconverged(found: SingularTriples) -> None:
    if found.residual > UNCONVERGED:
        warnings.warn(
            f"Singular values of R(H) are accurate to {found.residual:.1e} only: "
            f"{found.rounds} Lanczos rounds did not separate them.",
            RuntimeWarning,
            stacklevel=3,
        )


def _stacked(vectors: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    if not order:
        return torch.zeros(0, 0, dtype=torch.float64)
    return torch.stack([vectors[i] for i in order], dim=1)


def _bidiagonal(alphas: list[float], betas: list[float], columns: int) -> np.ndarray:
    """B [j, columns] with diagonal alphas and superdiagonal betas."""
    matrix = np.zeros((len(alphas), columns))
    np.fill_diagonal(matrix, alphas)
    for i, beta in enumerate(betas[: columns - 1]):
        matrix[i, i + 1] = beta
    return matrix
