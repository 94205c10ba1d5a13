"""Sample space: two N x N Grams of an unshared layer hold every number."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor

from kronecker_probe.gradients.samples import FactoredSamples
from kronecker_probe.linalg.eigenbasis import eigh_descending
from kronecker_probe.linalg.golub_kahan import (
    SingularTriples,
    Space,
    leading_triples,
    random_vector,
)
from kronecker_probe.operators.factors import Eigenbasis, Factor, SampleFactor
from kronecker_probe.operators.routes.base import LeadingProduct, Route
from kronecker_probe.operators.rows import Rows

# Half steps of plain power iteration after the Lanczos solve: they certify the fixed point and
# keep the coordinates nonnegative, hence the factors PSD.
POLISHING_ROUNDS = 2


@final
class SampleSpace(Route):
    """With Kd = (D D^T)^{o2} and Ka = (A A^T)^{o2}, R(H) maps v to w o (Ka v), back by Kd.

    A factor sum_i u_i S_i, S_i = sum_c d_ic d_ic^T, is its coordinate vector u; the inner
    products of such factors are u^T Kd u'.
    """

    name: ClassVar[str] = "sample"
    samples: FactoredSamples

    def __init__(self, samples: FactoredSamples) -> None:
        super().__init__(samples)
        self.outputs = Rows(samples.output_grads[:, :, 0])
        self.inputs = Rows(samples.inputs)

    def norm_squared(self) -> float:
        w = self.weights
        return float(w @ (self.outputs.squared_gram * self.inputs.squared_gram) @ w)

    @cached_property
    def _left(self) -> SampleFactor:
        return SampleFactor(self.outputs, self.weights * self.inputs.squared_norms)

    @cached_property
    def _right(self) -> SampleFactor:
        return SampleFactor(self.inputs, self.weights * self.outputs.squared_norms)

    def left_factor(self) -> Factor:
        return self._left

    def right_factor(self) -> Factor:
        return self._right

    def _outer_factors(
        self, outputs: Rows, inputs: Rows, input_weights: Tensor
    ) -> tuple[Factor, Factor]:
        # T = 1: these are the rows whose Grams exist already
        return SampleFactor(self.outputs, self.weights), SampleFactor(self.inputs, input_weights)

    def factor_inner(self, left: Factor, right: Factor) -> float:
        on_left, on_right = left.quadratic_forms(self.outputs), right.quadratic_forms(self.inputs)
        return float(self.weights @ (on_left * on_right))

    def eigen_diagonal(self, left: Eigenbasis, right: Eigenbasis) -> Tensor:
        on_left = left.project(self.outputs).square().sum(dim=1)
        on_right = right.project(self.inputs).square().sum(dim=1)
        return (on_left * self.weights[:, None]).T @ on_right

    def _triples(self, start: Tensor, k: int) -> SingularTriples:
        w, kd, ka = self.weights, self.outputs.squared_gram, self.inputs.squared_gram
        return leading_triples(
            forward=lambda dual: w * dual,
            adjoint=lambda dual: w * dual,
            start=start,
            k=k,
            left_space=Space(lambda u: kd @ u),
            right_space=Space(lambda v: ka @ v),
        )

    def leading(self) -> LeadingProduct:
        w, kd, ka = self.weights, self.outputs.squared_gram, self.inputs.squared_gram
        found = self._triples(w * (kd @ self._left.weights), 1)
        if found.leading_value == 0.0:
            return LeadingProduct(0.0, self._left, self._right, 0, 0.0)
        v = found.right if float(found.right.sum()) >= 0 else -found.right
        u = w * (ka @ v.clamp_min(0))
        for _ in range(POLISHING_ROUNDS):
            v = w * (kd @ u)
            v = v / (v @ (ka @ v)).sqrt()
            u = w * (ka @ v)
        u = u / (u @ (kd @ u)).sqrt()
        return LeadingProduct(
            found.leading_value,
            SampleFactor(self.outputs, u),
            SampleFactor(self.inputs, v),
            found.rounds + POLISHING_ROUNDS,
            found.residual,
        )

    def spectrum(self, k: int | None) -> Tensor:
        count = self.samples.n_data
        if k is not None and 4 * k < count:
            return self._triples(self.weights * random_vector(count, self.weights.device), k).values
        left, right = self._root(self.outputs.squared_gram), self._root(self.inputs.squared_gram)
        values: Tensor = torch.linalg.svdvals((left * self.weights) @ right.T)
        m, n = self.shape
        return values.cpu()[: min(m * m, n * n)][:k]

    @staticmethod
    def _root(squared_gram: Tensor) -> Tensor:
        """K^{1/2} up to a rotation: diag(lambda)^{1/2} Q^T."""
        values, vectors = eigh_descending(squared_gram)
        return values.clamp_min(0).sqrt()[:, None] * vectors.T
