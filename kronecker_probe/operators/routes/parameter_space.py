"""Parameter space: m x m and n x n matrices, half steps over chunks of data."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from kronecker_probe.linalg.golub_kahan import (
    SingularTriples,
    leading_triples,
    leading_values,
)
from kronecker_probe.operators.factors import Eigenbasis, Factor, MatrixFactor
from kronecker_probe.operators.routes.base import DEFAULT_LEADING, LeadingProduct, Route
from kronecker_probe.operators.routes.kernels import squared_product_sum


@final
class ParameterSpace(Route):
    """R(H) V = E[G V G^T] and R(H)^T U = E[G^T U G], never forming H; any samples."""

    name: ClassVar[str] = "parameter"

    def norm_squared(self) -> float:
        return squared_product_sum(self.samples, self.samples)

    def _left_factor(self) -> MatrixFactor:
        return MatrixFactor(self.kernels.left_step(None))

    def _right_factor(self) -> MatrixFactor:
        return MatrixFactor(self.kernels.right_step(None))

    def factor_inner(self, left: Factor, right: Factor) -> float:
        return self.kernels.kronecker_inner(left.matrix, right.matrix)

    def eigen_diagonal(self, left: Eigenbasis, right: Eigenbasis) -> Tensor:
        return self.kernels.projected_diagonal(left.vectors, right.vectors)

    def _forward(self, v: Tensor) -> Tensor:
        n = self.shape[1]
        return self.kernels.left_step(v.view(n, n)).reshape(-1)

    def _adjoint(self, u: Tensor) -> Tensor:
        m = self.shape[0]
        return self.kernels.right_step(u.view(m, m)).reshape(-1)

    def leading(self) -> LeadingProduct:
        eye = torch.eye(self.shape[1], dtype=torch.float64, device=self.weights.device)
        found = leading_triples(self._forward, self._adjoint, eye.reshape(-1))
        return matrix_product(found) or self.void()

    def spectrum(self, k: int | None) -> Tensor:
        size, device = self.shape[1] ** 2, self.weights.device

        def draw(generator: torch.Generator) -> Tensor:
            return torch.randn(size, dtype=torch.float64, generator=generator).to(device)

        wanted = DEFAULT_LEADING if k is None else k
        return leading_values(self._forward, self._adjoint, draw, wanted)


def matrix_product(found: SingularTriples) -> LeadingProduct | None:
    """The leading product from vec(U_1) and vec(V_1), both PSD by sign; None for H = 0."""
    if found.leading_value == 0.0:
        return None
    left, right = _psd_factor(found.left[:, 0]), _psd_factor(found.right[:, 0])
    return LeadingProduct(found.leading_value, left, right, found.rounds, found.residual)


def _psd_factor(vector: Tensor) -> MatrixFactor:
    size = round(len(vector) ** 0.5)
    matrix = vector.reshape(size, size)
    matrix = 0.5 * (matrix + matrix.T)
    return MatrixFactor(matrix * torch.sign(matrix.diagonal().sum()))
