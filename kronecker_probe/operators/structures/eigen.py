"""A diagonal operator in a Kronecker-factored basis."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.operators.base import Operator, check_nonnegative
from kronecker_probe.operators.factors.factor import Eigenbasis, spectrum_power
from kronecker_probe.operators.structures.kronecker import KroneckerOperator
from kronecker_probe.operators.structures.kronecker_sum import KroneckerSum


@final
class EigenOperator(Operator):
    """P = (Q_L kron Q_R) diag(D) (Q_L kron Q_R)^T: G -> Q_L (D o Q_L^T G Q_R) Q_R^T.

    Args:
        left_basis: Q_L, [m, r], orthonormal columns.
        right_basis: Q_R, [n, s], orthonormal columns.
        eigenvalues: D, [r, s], nonnegative.
        exact: Whether D is what it says in each entry, as what an optimizer divides by; then only
            zeros are null. Else entries below the rounding of a decomposition are.
    """

    inner_rank = 1

    def __init__(
        self,
        left_basis: Tensor | Eigenbasis,
        right_basis: Tensor | Eigenbasis,
        eigenvalues: Tensor,
        *,
        exact: bool = False,
    ) -> None:
        self.left = _as_basis(left_basis)
        self.right = _as_basis(right_basis)
        self.eigenvalues = eigenvalues.detach().double()
        self.exact = exact
        self.shape, self.device = (self.left.size, self.right.size), eigenvalues.device
        check_nonnegative("eigenvalues", self.eigenvalues)
        if eigenvalues.shape != (self.left.rank, self.right.rank):
            raise InvalidInputError(
                f"eigenvalues are {list(eigenvalues.shape)}; bases of {self.left.rank} and "
                f"{self.right.rank} columns need [{self.left.rank}, {self.right.rank}]."
            )

    @property
    def left_basis(self) -> Tensor:
        """Q_L, float64 [m, r], formed on first use."""
        return self.left.vectors

    @property
    def right_basis(self) -> Tensor:
        """Q_R, float64 [n, s], formed on first use."""
        return self.right.vectors

    def norm(self) -> float:
        return float(torch.linalg.vector_norm(self.eigenvalues))

    def trace(self) -> float:
        return float(self.eigenvalues.sum())

    def _inner(self, other: Operator) -> float:
        return float((self.eigenvalues * other.eigen_diagonal(self.left, self.right)).sum())

    def power(self, p: float) -> EigenOperator:
        """P^p; for p <= 0 the pseudo-inverse power, null on the null space of P."""
        values = self.eigenvalues
        powered = spectrum_power(values, p, 0 if self.exact else values.numel())
        return EigenOperator(self.left, self.right, powered, exact=self.exact)

    def projected_diagonal(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        left = (self.left_basis.T @ left_basis).square()
        right = (self.right_basis.T @ right_basis).square()
        return left.T @ self.eigenvalues @ right

    def kronecker_inner(self, left: Tensor, right: Tensor) -> float:
        on_left = ((left @ self.left_basis) * self.left_basis).sum(dim=0)
        on_right = ((right @ self.right_basis) * self.right_basis).sum(dim=0)
        return float(on_left @ self.eigenvalues @ on_right)

    def block(self, rows: slice, columns: slice) -> KroneckerSum:
        # rows of an orthonormal basis are not orthonormal: sum over the vectors of one side
        left, right, values = self.left_basis[rows], self.right_basis[columns], self.eigenvalues
        if len(values) < len(values.T):
            sides = [
                (torch.outer(q, q), (right * value) @ right.T)
                for q, value in zip(left.T, values, strict=True)
            ]
        else:
            sides = [
                ((left * value) @ left.T, torch.outer(q, q))
                for q, value in zip(right.T, values.T, strict=True)
            ]
        return KroneckerSum([KroneckerOperator(*side) for side in sides])

    def _apply(self, x: Tensor) -> Tensor:
        rotated = self.left_basis.T @ x @ self.right_basis
        return self.left_basis @ (self.eigenvalues * rotated) @ self.right_basis.T

    def __repr__(self) -> str:
        m, n = self.shape
        return f"EigenOperator({m} x {n}, {list(self.eigenvalues.shape)} eigenvalues)"


def _as_basis(basis: Tensor | Eigenbasis) -> Eigenbasis:
    return basis if isinstance(basis, Eigenbasis) else Eigenbasis.of(basis)
