"""Dense: the rearranged m^2 x n^2 matrix R(H), for small layers."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor

from kronecker_probe.linalg.golub_kahan import LinearMap, SingularTriples, leading_triples
from kronecker_probe.linalg.memory import require_memory
from kronecker_probe.linalg.rearrangement import project_rearranged, restore
from kronecker_probe.operators.factors.factor import Eigenbasis, Factor, MatrixFactor
from kronecker_probe.operators.second_moment.routes.base import LeadingProduct, Route


@final
class DenseSpace(Route):
    """R(H) in R^{m^2 x n^2}, formed once; everything else is read off it."""

    name: ClassVar[str] = "dense"

    @cached_property
    def rearranged(self) -> Tensor:
        """R(H), float64 [m^2, n^2]."""
        m, n = self.shape
        require_memory(8 * (m * n) ** 2, f"R(H), {m * m} x {n * n},", self.weights.device)
        return self.kernels.rearranged()

    def to_dense(self) -> Tensor:
        """H, float64 [mn, mn]."""
        return restore(self.rearranged, self.shape)

    def norm_squared(self) -> float:
        return float(torch.linalg.vector_norm(self.rearranged).square())

    def step(self, side: int, given: Factor | None) -> MatrixFactor:
        matrix = (
            torch.eye(self.shape[1 - side], dtype=torch.float64, device=self.weights.device)
            if given is None
            else given.matrix
        )
        rearranged = self.rearranged.T if side else self.rearranged
        return MatrixFactor((rearranged @ matrix.reshape(-1)).view(2 * (self.shape[side],)))

    def factor_inner(self, left: Factor, right: Factor) -> float:
        return float(left.matrix.reshape(-1) @ (self.rearranged @ right.matrix.reshape(-1)))

    def eigen_diagonal(self, left: Eigenbasis, right: Eigenbasis) -> Tensor:
        projected = project_rearranged(self.rearranged, left.vectors, right.vectors)
        return projected.clamp_min(0)  # a sum of squares, but for the rounding of differences

    def leading(self) -> LeadingProduct:
        found = leading_triples(
            LinearMap(lambda v: self.rearranged @ v, lambda u: self.rearranged.T @ u),
            self.rearranged.T @ self.left.matrix.reshape(-1),
        )
        return _matrix_product(found) or self.void()

    def spectrum(self, k: int | None) -> Tensor:
        values: Tensor = torch.linalg.svdvals(self.rearranged)
        if self.samples.n_positions == 1:  # the rank of R(H) is at most N
            values = values[: self.samples.n_examples]
        return values.cpu()[:k]


def _matrix_product(found: SingularTriples) -> LeadingProduct | None:
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
