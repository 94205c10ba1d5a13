"""Sample space: two N x N Grams of an unshared layer hold every number."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor

from kronecker_probe.gradients.samples import FactoredSamples
from kronecker_probe.linalg.eigenbasis import eigh_descending
from kronecker_probe.linalg.golub_kahan import Space, leading_triples, leading_values
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

    @cached_property
    def _spaces(self) -> tuple[Space, Space]:
        kd, ka = self.outputs.squared_gram, self.inputs.squared_gram
        return Space(lambda u: kd @ u), Space(lambda v: ka @ v)

    def _weighted(self, dual: Tensor) -> Tensor:
        """R(H), and its adjoint too: from the dual coordinates of one side to the other's."""
        return self.weights * dual

    def leading(self) -> LeadingProduct:
        w, kd, ka = self.weights, self.outputs.squared_gram, self.inputs.squared_gram
        start = w * (kd @ self._left.weights)
        outputs, inputs = self._spaces
        found = leading_triples(
            self._weighted, self._weighted, start, left_space=outputs, right_space=inputs
        )
        if found.leading_value == 0.0:
            return self.void()
        v = found.right[:, 0] * torch.sign(found.right.sum())
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
            outputs, inputs = self._spaces
            return leading_values(
                self._weighted,
                self._weighted,
                count,
                k,
                device=self.weights.device,
                left_space=outputs,
                right_space=inputs,
            )
        left, right = self._root(self.outputs.squared_gram), self._root(self.inputs.squared_gram)
        values: Tensor = torch.linalg.svdvals((left * self.weights) @ right.T)
        m, n = self.shape
        return values.cpu()[: min(m * m, n * n)][:k]

    @staticmethod
    def _root(squared_gram: Tensor) -> Tensor:
        """K^{1/2} up to a rotation: diag(lambda)^{1/2} Q^T."""
        values, vectors = eigh_descending(squared_gram)
        return values.clamp_min(0).sqrt()[:, None] * vectors.T
