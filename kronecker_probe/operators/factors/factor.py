"""The symmetric PSD factors of a Kronecker product, formed only when asked for.

A factor is a matrix, or a weighted sum of outer products of its target's vectors. The second
kind never needs its k x k matrix for traces, norms, inner products and quadratic forms: the
Grams of the vectors suffice, and so do they for its matrix powers.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.linalg.eigenbasis import eigh_descending
from kronecker_probe.operators.factors.vectors import Rows

# Gram eigenvalues below this share of the largest carry no correct digit of their eigenvector.
GRAM_CUTOFF = 1e-13
# Where an example's root weight is below this share of the largest, dividing by it loses digits.
ROOT_CUTOFF = 1e-4


class Eigenbasis(abc.ABC):
    """Orthonormal columns Q [k, r] of one side, formed only when asked for.

    Attributes:
        size: k.
        rank: r.
    """

    size: int
    rank: int

    @staticmethod
    def of(vectors: Tensor) -> Eigenbasis:
        """The basis with the columns of ``vectors`` [k, r]."""
        return VectorBasis(vectors.detach().double())

    @property
    @abc.abstractmethod
    def vectors(self) -> Tensor:
        """Q, float64 [k, r]."""

    @abc.abstractmethod
    def project(self, rows: Rows) -> Tensor:
        """X Q, float64 [N, C, r]."""


@final
class VectorBasis(Eigenbasis):
    """A basis given by its vectors."""

    def __init__(self, vectors: Tensor) -> None:
        self.size, self.rank = vectors.shape
        self._vectors = vectors
        self._last: tuple[Rows, Tensor] | None = None

    @property
    def vectors(self) -> Tensor:
        return self._vectors

    def project(self, rows: Rows) -> Tensor:
        if self._last is None or self._last[0] is not rows:
            self._last = rows, rows.values.double() @ self._vectors
        return self._last[1]


@final
class SampleBasis(Eigenbasis):
    """Q = X^T B, in the sample space of its rows: the range of a rank-deficient factor.

    Args:
        rows: X.
        coefficients: B, float64 [N C, r].
        projection: X Q where it is known, float64 [N C, r].
    """

    def __init__(self, rows: Rows, coefficients: Tensor, projection: Tensor | None = None) -> None:
        self.size, self.rank = rows.size, coefficients.shape[1]
        self._rows = rows
        self._coefficients = coefficients
        self._projection = projection

    @cached_property
    def vectors(self) -> Tensor:
        return self._rows.values.flatten(0, 1).double().T @ self._coefficients

    @cached_property
    def _own_projection(self) -> Tensor:
        if self._projection is not None:
            return self._projection
        return self._rows.gram @ self._coefficients

    def project(self, rows: Rows) -> Tensor:
        if rows is self._rows:
            return self._own_projection.view(*rows.values.shape[:2], -1)
        return rows.values.double() @ self.vectors


@dataclass(frozen=True)
class Eigen:
    """Eigenvalues, float64 [r], descending, and their basis."""

    values: Tensor
    basis: Eigenbasis


class Factor(abc.ABC):
    """A symmetric PSD k x k matrix, one side of a Kronecker product.

    Attributes:
        size: k.
        device: Where it lives.
    """

    size: int
    device: torch.device

    @property
    @abc.abstractmethod
    def matrix(self) -> Tensor:
        """The matrix itself, float64 [k, k], formed on first use."""

    @abc.abstractmethod
    def trace(self) -> float:
        """The trace."""

    @abc.abstractmethod
    def quadratic_forms(self, rows: Rows) -> Tensor:
        """sum_c x_ic^T F x_ic, float64 [N]."""

    @abc.abstractmethod
    def eigen(self) -> Eigen:
        """Eigenvalues and eigenvectors, descending, computed once."""

    def power(self, p: float) -> Factor:
        """F^p on the range of F (for p <= 0 the null space stays null)."""
        eigen = self.eigen()
        return SpectralFactor(eigen.basis, spectrum_power(eigen.values, p, self.size))

    def norm(self) -> float:
        """The Frobenius norm."""
        return float(torch.linalg.vector_norm(self.matrix))

    def inner(self, other: Factor) -> float:
        """<F, F'> = tr(F F')."""
        return float((self.matrix * other.matrix).sum())

    def projected_diagonal(self, basis: Tensor) -> Tensor:
        """diag(Q^T F Q), float64 [r], of a ``basis`` [k, r]."""
        return ((self.matrix @ basis) * basis).sum(dim=0)

    def diagonal(self) -> Tensor:
        """diag(F), float64 [k]."""
        return self.matrix.diagonal()


@final
class MatrixFactor(Factor):
    """A factor given as its matrix [k, k]."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InvalidInputError(f"A factor must be square; got {list(matrix.shape)}.")
        self.size, self.device = matrix.shape[0], matrix.device
        self._matrix = matrix.detach().double()

    @property
    def matrix(self) -> Tensor:
        return self._matrix

    def trace(self) -> float:
        return float(self._matrix.diagonal().sum())

    def quadratic_forms(self, rows: Rows) -> Tensor:
        return rows.quadratic_forms(self._matrix)

    @cached_property
    def _eigen(self) -> Eigen:
        values, vectors = eigh_descending(self._matrix)
        return Eigen(values, VectorBasis(vectors))

    def eigen(self) -> Eigen:
        return self._eigen


@final
class SampleFactor(Factor):
    """F = sum_i u_i sum_c x_ic x_ic^T, in the sample space of its rows.

    A factor has u >= 0. Later singular vectors of R(H) have u of any sign: all but their
    eigenvalues and powers is defined.
    """

    def __init__(self, rows: Rows, weights: Tensor) -> None:
        self.size, self.device = rows.size, weights.device
        self.rows = rows
        self.weights = weights

    @cached_property
    def matrix(self) -> Tensor:
        return self.rows.outer_sum(self.weights)

    @cached_property
    def _squared_gram_weights(self) -> Tensor:
        return self.rows.squared_gram @ self.weights

    def trace(self) -> float:
        return float(self.weights @ self.rows.squared_norms)

    def norm(self) -> float:
        return math.sqrt(float(self.weights @ self._squared_gram_weights))

    def quadratic_forms(self, rows: Rows) -> Tensor:
        if rows is self.rows:
            return self._squared_gram_weights
        return rows.quadratic_forms(self.matrix)

    def inner(self, other: Factor) -> float:
        return float(self.weights @ other.quadratic_forms(self.rows))

    @cached_property
    def _eigen(self) -> Eigen:
        if self.size < self.rows.count:
            values, vectors = eigh_descending(self.matrix)
            return Eigen(values, VectorBasis(vectors))
        # X^T D D X = F and D X X^T D share their nonzero spectrum; Q = X^T D E lambda^{-1/2}.
        root = self.weights.sqrt().repeat_interleave(self.rows.values.shape[1])
        values, vectors = eigh_descending(root[:, None] * self.rows.gram * root)
        rank = int((values > GRAM_CUTOFF * values[0].clamp_min(0)).sum())
        values = values[:rank]
        vectors = vectors[:, :rank]
        coefficients = root[:, None] * vectors / values.sqrt()
        known = None
        if float(root.min()) > ROOT_CUTOFF * float(root.max()):
            known = vectors * values.sqrt() / root[:, None]  # X Q without the product X X^T B
        return Eigen(values, SampleBasis(self.rows, coefficients, known))

    def eigen(self) -> Eigen:
        return self._eigen


@final
class SpectralFactor(Factor):
    """F = Q diag(f) Q^T: a matrix function of another factor, in that factor's eigenbasis."""

    def __init__(self, basis: Eigenbasis, values: Tensor) -> None:
        self.size, self.device = basis.size, values.device
        self.basis = basis
        self.values = values

    @cached_property
    def matrix(self) -> Tensor:
        vectors = self.basis.vectors
        return (vectors * self.values) @ vectors.T

    def trace(self) -> float:
        return float(self.values.sum())

    def norm(self) -> float:
        return float(torch.linalg.vector_norm(self.values))

    def quadratic_forms(self, rows: Rows) -> Tensor:
        projected = self.basis.project(rows)
        return projected.square().sum(dim=1) @ self.values

    def inner(self, other: Factor) -> float:
        if isinstance(other, SpectralFactor) and other.basis is self.basis:
            return float(self.values @ other.values)
        if isinstance(other, SampleFactor):
            return other.inner(self)
        return super().inner(other)

    def eigen(self) -> Eigen:
        order = torch.argsort(self.values, descending=True)
        return Eigen(self.values[order], VectorBasis(self.basis.vectors[:, order]))


@final
class IdentityFactor(Factor):
    """The identity, [k, k], formed only when asked for.

    Args:
        size: k.
        device: Where it counts as living.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device

    @cached_property
    def matrix(self) -> Tensor:
        return torch.eye(self.size, dtype=torch.float64, device=self.device)

    def trace(self) -> float:
        return float(self.size)

    def norm(self) -> float:
        return math.sqrt(self.size)

    def quadratic_forms(self, rows: Rows) -> Tensor:
        return rows.squared_norms

    def inner(self, other: Factor) -> float:
        return other.trace()

    def diagonal(self) -> Tensor:
        return torch.ones(self.size, dtype=torch.float64, device=self.device)

    def eigen(self) -> Eigen:
        ones = torch.ones(self.size, dtype=torch.float64, device=self.device)
        return Eigen(ones, Eigenbasis.of(self.matrix))

    def power(self, p: float) -> Factor:
        return self


def spectrum_power(values: Tensor, p: float, size: int) -> Tensor:
    """Entrywise values^p of a PSD spectrum; what is below rounding is null, for any p.

    Args:
        values: The spectrum.
        p: The power.
        size: How many roundings of the largest value; 0 for those that are exact.

    Raises:
        InvalidInputError: p is not a finite number.
    """
    if not math.isfinite(p):
        raise InvalidInputError(f"power got p={p}; give a finite exponent.")
    top = float(values.max()) if values.numel() else 0.0
    floor = max(0.0, top * size * torch.finfo(torch.float64).eps)
    powered = values.clamp_min(torch.finfo(torch.float64).tiny).pow(p)
    return torch.where(values > floor, powered, torch.zeros_like(values))
