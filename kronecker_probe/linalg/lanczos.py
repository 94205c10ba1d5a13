"""Functions of a PSD map times a vector, by Lanczos with full reorthogonalization."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
# A new direction below this share of the largest eigenvalue seen is rounding.
BREAKDOWN = 64 * EPS
# Rounds between two looks at the convergence.
STRIDE = 5

Map: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DampedPowers:
    """(A + d I)^{-p} b for several p.

    Attributes:
        values: One float64 vector per power.
        rounds: Applications of A.
        error: Bound on the worst relative error |x - (A + d I)^{-p} b| / |x|.
    """

    values: tuple[Tensor, ...]
    rounds: int
    error: float


class _Krylov:
    """Orthonormal v_1 .. v_j with A V = V T + beta v_{j+1} e_j^T, T tridiagonal."""

    def __init__(self, apply: Map, start: Tensor) -> None:
        self.apply = apply
        self.size = float(torch.linalg.vector_norm(start))
        self.vectors = (start / self.size)[None]
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.exhausted = False

    def advance(self, rounds: int) -> None:
        """Up to so many rounds more; fewer where the Krylov space ends."""
        room = self.vectors.new_empty(rounds, self.vectors.shape[1])
        vectors = torch.cat([self.vectors, room])
        count = len(self.vectors)
        for _ in range(rounds):
            v = vectors[count - 1]
            image = self.apply(v)
            alpha = float(image @ v)
            self.alphas.append(alpha)
            known = vectors[:count]
            for _ in range(2):  # twice is enough
                image = image - (known @ image) @ known
            beta = float(torch.linalg.vector_norm(image))
            scale = max(abs(a) + b for a, b in zip(self.alphas, [0.0, *self.betas], strict=True))
            if not beta > BREAKDOWN * scale or count == vectors.shape[1]:
                self.betas.append(0.0)
                self.exhausted = True
                break
            self.betas.append(beta)
            vectors[count] = image / beta
            count += 1
        self.vectors = vectors[:count]

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of T, clamped to be nonnegative, and its eigenvectors, on the CPU."""
        diagonal = torch.tensor(self.alphas, dtype=torch.float64)
        beside = torch.tensor(self.betas[: len(self.alphas) - 1], dtype=torch.float64)
        matrix = torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)
        values, vectors = torch.linalg.eigh(matrix)
        return values.clamp_min(0), vectors


def damped_powers(
    apply: Map,
    b: Tensor,
    damping: float,
    powers: Sequence[float],
    *,
    tolerance: float = 1e-8,
    max_rounds: int = 1000,
) -> DampedPowers:
    """(A + d I)^{-p} b of a PSD map A, d > 0 and powers 0 < p <= 1.

    Stops on a bound of the error, not on stagnation. For p = 1 the residual after j rounds is
    r_j = |b| beta_j |e_j^T (T_j + d)^{-1} e_1|. z^{-p} is the integral over t >= 0 of
    (z + t)^{-1} against a positive measure, and the residuals of all shifts t >= 0 are at most
    r_j, so |error| <= r_j d^{-p} (Frommer and Simoncini, 2008, on Stieltjes functions).

    Args:
        apply: A on float64 vectors [k].
        b: float64 [k].
        damping: d.
        powers: The p.
        tolerance: Relative error at which to stop.
        max_rounds: Rounds after which the best so far is returned.

    Returns:
        The vectors with their bound; zero for b = 0.
    """
    size = float(torch.linalg.vector_norm(b))
    if size == 0.0:
        return DampedPowers(tuple(torch.zeros_like(b) for _ in powers), 0, 0.0)
    krylov = _Krylov(apply, b)
    while True:
        krylov.advance(min(STRIDE, max_rounds - len(krylov.alphas)))
        count = len(krylov.alphas)
        values, vectors = krylov.ritz()
        inverse = float(((vectors[-1] * vectors[0]) / (values + damping)).sum())
        residual = krylov.betas[-1] * abs(inverse)
        images = [
            vectors @ (vectors[0] * (values / damping + 1.0).pow(-p)) for p in powers
        ]  # in units of d^{-p}
        error = max(residual / float(torch.linalg.vector_norm(image)) for image in images)
        if krylov.exhausted or error <= tolerance or count >= max_rounds:
            break
    basis = krylov.vectors[:count]
    found = tuple(
        (size * damping**-p) * (image.to(basis.device) @ basis)
        for p, image in zip(powers, images, strict=True)
    )
    return DampedPowers(found, count, error)


def quadratic_log(
    apply: Map, b: Tensor, *, tolerance: float = 1e-6, max_rounds: int = 200
) -> float:
    """b^T log(I + A) b of a PSD map A, by Gauss quadrature.

    Golub and Meurant (1994): |b|^2 sum_k tau_k^2 log(1 + theta_k) over the Ritz values theta_k,
    with tau_k the first entries of their vectors.

    Args:
        apply: A on float64 vectors [k].
        b: float64 [k].
        tolerance: Relative change over a few rounds at which to stop.
        max_rounds: Rounds after which to stop in any case.
    """
    size = float(torch.linalg.vector_norm(b))
    if size == 0.0:
        return 0.0
    krylov = _Krylov(apply, b)
    last = math.inf
    while True:
        krylov.advance(min(STRIDE, max_rounds - len(krylov.alphas)))
        values, vectors = krylov.ritz()
        found = float(vectors[0].square() @ values.log1p())
        settled = abs(found - last) <= tolerance * abs(found)
        if krylov.exhausted or settled or len(krylov.alphas) >= max_rounds:
            return size**2 * found
        last = found
