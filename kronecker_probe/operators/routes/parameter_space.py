"""Parameter space: m x m and n x n matrices, half steps over chunks of data."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor

from kronecker_probe.linalg.golub_kahan import (
    SingularTriples,
    leading_triples,
    random_vector,
)
from kronecker_probe.operators.factors import Eigenbasis, Factor, MatrixFactor
from kronecker_probe.operators.routes.base import DEFAULT_LEADING, LeadingProduct, Route
from kronecker_probe.operators.routes.kernels import squared_product_sum
from kronecker_probe.operators.rows import Rows


@final
class ParameterSpace(Route):
    """R(H) V = E[G V G^T] and R(H)^T U = E[G^T U G], never forming H; any samples."""

    name: ClassVar[str] = "parameter"

    def norm_squared(self) -> float:
        return squared_product_sum(self.samples, self.samples)

    @cached_property
    def _left(self) -> MatrixFactor:
        return MatrixFactor(self.kernels.left_step(None))

    @cached_property
    def _right(self) -> MatrixFactor:
        return MatrixFactor(self.kernels.right_step(None))

    def left_factor(self) -> Factor:
        return self._left

    def right_factor(self) -> Factor:
        return self._right

    def _outer_factors(
        self, outputs: Rows, inputs: Rows, input_weights: Tensor
    ) -> tuple[Factor, Factor]:
        return (
            MatrixFactor(outputs.outer_sum(self.weights)),
            MatrixFactor(inputs.outer_sum(input_weights)),
        )

    def factor_inner(self, left: Factor, right: Factor) -> float:
        return self.kernels.kronecker_inner(left.matrix, right.matrix)

    def eigen_diagonal(self, left: Eigenbasis, right: Eigenbasis) -> Tensor:
        return self.kernels.projected_diagonal(left.vectors, right.vectors)

    def leading(self) -> LeadingProduct:
        _, n = self.shape
        start = torch.eye(n, dtype=torch.float64, device=self.weights.device)
        found = self._triples(start.reshape(-1), 1)
        return matrix_product(found)

    def spectrum(self, k: int | None) -> Tensor:
        _, n = self.shape
        if k is None:
            k = DEFAULT_LEADING
        # G V G^T maps symmetric to symmetric and antisymmetric to antisymmetric matrices, so a
        # symmetric start would miss the second kind
        start = random_vector(n * n, self.weights.device)
        return self._triples(start, k).values

    def _triples(self, start: Tensor, k: int) -> SingularTriples:
        m, n = self.shape
        return leading_triples(
            forward=lambda v: self.kernels.left_step(v.view(n, n)).reshape(-1),
            adjoint=lambda u: self.kernels.right_step(u.view(m, m)).reshape(-1),
            start=start,
            k=k,
        )


def matrix_product(found: SingularTriples) -> LeadingProduct:
    """The leading product from vec(U_1) and vec(V_1), with the sign that makes both PSD."""
    sides = []
    for vector in (found.left, found.right):
        size = round(vector.numel() ** 0.5)
        matrix = vector.reshape(size, size)
        matrix = 0.5 * (matrix + matrix.T)
        trace = float(matrix.diagonal().sum())
        sides.append(MatrixFactor(-matrix if trace < 0 else matrix))
    return LeadingProduct(found.leading_value, sides[0], sides[1], found.rounds, found.residual)
