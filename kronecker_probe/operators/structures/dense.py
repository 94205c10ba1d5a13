"""An explicit mn x mn matrix, for small layers, oracles and matrices of the user's own."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.linalg.eigenbasis import eigh_descending
from kronecker_probe.linalg.rearrangement import project_rearranged, rearrange
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.factors.factor import spectrum_power


@final
class DenseOperator(Operator):
    """P as a matrix.

    Args:
        matrix: Symmetric PSD [mn, mn], in row-major vec.
        shape: (m, n).
    """

    def __init__(self, matrix: Tensor, shape: tuple[int, int]) -> None:
        size = shape[0] * shape[1]
        if matrix.shape != (size, size):
            raise InvalidInputError(
                f"A dense operator on {shape[0]} x {shape[1]} matrices is [{size}, {size}]; "
                f"got {list(matrix.shape)}."
            )
        self.matrix = matrix.detach().double()
        self.shape, self.device = (shape[0], shape[1]), matrix.device

    def norm(self) -> float:
        return float(torch.linalg.vector_norm(self.matrix))

    def trace(self) -> float:
        return float(self.matrix.diagonal().sum())

    def power(self, p: float) -> DenseOperator:
        """P^p; for p <= 0 the pseudo-inverse power, null on the null space of P."""
        values, vectors = eigh_descending(self.matrix)
        powered = spectrum_power(values, p, len(values))
        return DenseOperator((vectors * powered) @ vectors.T, self.shape)

    def projected_diagonal(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        return project_rearranged(rearrange(self.matrix, self.shape), left_basis, right_basis)

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal().view(self.shape)

    def kronecker_inner(self, left: Tensor, right: Tensor) -> float:
        rearranged = rearrange(self.matrix, self.shape)
        return float(left.reshape(-1) @ (rearranged @ right.reshape(-1)))

    def block(self, rows: slice, columns: slice) -> DenseOperator:
        part = self.matrix.view(2 * self.shape)[rows, columns, rows, columns]
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        size = shape[0] * shape[1]
        return DenseOperator(part.reshape(size, size), shape)

    def _apply(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix).view(x.shape)

    def to_dense(self) -> Tensor:
        return self.matrix

    def __repr__(self) -> str:
        return f"DenseOperator({self.shape[0]} x {self.shape[1]})"
