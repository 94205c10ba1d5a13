"""A Kronecker product of two PSD factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.factors.factor import Factor, MatrixFactor


@final
class KroneckerOperator(Operator):
    """P = scale * left kron right: G -> scale * left G right.

    Args:
        left: [m, m] symmetric PSD, a tensor or a factor in its target's sample space.
        right: [n, n] likewise.
        scale: A factor in front of both.
        info: How it was found, for example ``{"rounds": 7, "residual": 1e-12}``.
    """

    inner_rank = 4

    def __init__(
        self,
        left: Tensor | Factor,
        right: Tensor | Factor,
        scale: float = 1.0,
        info: Mapping[str, float] | None = None,
    ) -> None:
        self.left_factor = left if isinstance(left, Factor) else MatrixFactor(left)
        self.right_factor = right if isinstance(right, Factor) else MatrixFactor(right)
        self.shape = self.left_factor.size, self.right_factor.size
        self.device = self.left_factor.device
        self.scale = scale
        self.info = dict(info or {})

    @property
    def left(self) -> Tensor:
        """The left factor, float64 [m, m], formed on first use."""
        return self.left_factor.matrix

    @property
    def right(self) -> Tensor:
        """The right factor, float64 [n, n], formed on first use."""
        return self.right_factor.matrix

    def norm(self) -> float:
        return abs(self.scale) * self.left_factor.norm() * self.right_factor.norm()

    def trace(self) -> float:
        return self.scale * self.left_factor.trace() * self.right_factor.trace()

    def _inner(self, other: Operator) -> float:
        if isinstance(other, KroneckerOperator):
            left = self.left_factor.inner(other.left_factor)
            return self.scale * other.scale * left * self.right_factor.inner(other.right_factor)
        return self.scale * other.factor_inner(self.left_factor, self.right_factor)

    def power(self, p: float) -> KroneckerOperator:
        """P^p; for p <= 0 the pseudo-inverse power, null on the null space of P."""
        scale = self.scale**p if self.scale > 0 else 0.0
        return KroneckerOperator(self.left_factor.power(p), self.right_factor.power(p), scale)

    def projected_diagonal(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        left = self.left_factor.projected_diagonal(left_basis)
        return self.scale * torch.outer(left, self.right_factor.projected_diagonal(right_basis))

    def diagonal(self) -> Tensor:
        return self.scale * torch.outer(self.left_factor.diagonal(), self.right_factor.diagonal())

    def kronecker_inner(self, left: Tensor, right: Tensor) -> float:
        sides = float((self.left * left).sum()) * float((self.right * right).sum())
        return self.scale * sides

    def block(self, rows: slice, columns: slice) -> KroneckerOperator:
        return KroneckerOperator(self.left[rows, rows], self.right[columns, columns], self.scale)

    def _apply(self, x: Tensor) -> Tensor:
        return self.scale * (self.left @ x @ self.right)

    def __repr__(self) -> str:
        m, n = self.shape
        return f"KroneckerOperator({m} x {m} kron {n} x {n}, scale={self.scale:.4g})"
