"""Sample space: two N x N Grams of an unshared layer hold every number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor

from kronecker_probe.gradients.samples.base import FactoredSamples
from kronecker_probe.linalg.eigenbasis import eigh_descending
from kronecker_probe.linalg.golub_kahan import LinearMap, Space, leading_triples, repeated_triples
from kronecker_probe.operators.factors.factor import Eigenbasis, Factor, MatrixFactor, SampleFactor
from kronecker_probe.operators.factors.vectors import Rows
from kronecker_probe.operators.second_moment.kernels.vectors import vectors
from kronecker_probe.operators.second_moment.routes.base import Group, LeadingProduct, Route

# Half steps of plain power iteration after the Lanczos solve: they certify the fixed point and
# keep the coordinates nonnegative, hence the factors PSD.
POLISHING_ROUNDS = 2
# Negative coordinates below this share of the largest are rounding of a PSD factor.
ROUNDING = 1e-12


@final
class SampleSpace(Route):
    """Two Grams, Kd = (D D^T)^{o2} and Ka = (A A^T)^{o2}, and vectors of N coordinates.

    A factor sum_i u_i S_i, S_i = sum_c d_ic d_ic^T, is its coordinate vector u; inner products
    of such factors are u^T Kd u'. R(H) maps coordinates v to w o (Ka v), its adjoint u to
    w o (Kd u).
    """

    name: ClassVar[str] = "sample"
    samples: FactoredSamples

    def __init__(self, samples: FactoredSamples) -> None:
        super().__init__(samples)
        self.sides = vectors(samples)

    @property
    def outputs(self) -> Rows:
        """d, with the Gram Kd."""
        return self.sides[0]

    @property
    def inputs(self) -> Rows:
        """a, with the Gram Ka."""
        return self.sides[1]

    def subset(self, samples: FactoredSamples, index: Group) -> SampleSpace:
        """The same for some of the examples; their Grams are cut out of these."""
        part = SampleSpace(samples)
        part.sides = self.outputs.subset(index), self.inputs.subset(index)
        return part

    @cached_property
    def _pairs(self) -> Tensor:
        return self.outputs.squared_gram * self.inputs.squared_gram

    def step(self, side: int, given: Factor | None) -> Factor:
        return _weighted(self.sides[side], self.weights * self._forms(1 - side, given))

    def grouped_step(
        self, side: int, given: Factor | None, groups: Sequence[Group]
    ) -> list[Factor]:
        forms = self._forms(1 - side, given)
        return [_weighted(self.sides[side], part) for part in self._parts(forms, groups)]

    def _forms(self, side: int, factor: Factor | None) -> Tensor:
        rows = self.sides[side]
        return rows.squared_norms if factor is None else factor.quadratic_forms(rows)

    def _parts(self, forms: Tensor, groups: Sequence[Group]) -> Iterator[Tensor]:
        weighted = self.weights * forms
        for group in groups:
            part = torch.zeros_like(weighted)
            part[group] = weighted[group]
            yield part

    def grouped_forms(self, lefts: Tensor, rights: Tensor, groups: Sequence[Group]) -> Tensor:
        on_left = torch.stack([self.outputs.quadratic_forms(left) for left in lefts], dim=1)
        on_right = torch.stack([self.inputs.quadratic_forms(right) for right in rights], dim=1)
        on_right = on_right * self.weights[:, None]
        return torch.stack([on_left[group].T @ on_right[group] for group in groups])

    def quadratic_forms(self, left: Factor | None, right: Factor | None) -> Tensor:
        return self._forms(0, left) * self._forms(1, right)

    def _outer_factors(
        self, outputs: Rows, inputs: Rows, input_weights: Tensor
    ) -> tuple[Factor, Factor]:
        # T = 1: these are the rows whose Grams exist already
        return SampleFactor(self.outputs, self.weights), SampleFactor(self.inputs, input_weights)

    def factor_inner(self, left: Factor, right: Factor) -> float:
        return float(self.weights @ self.quadratic_forms(left, right))

    def eigen_diagonal(self, left: Eigenbasis, right: Eigenbasis) -> Tensor:
        on_left = left.project(self.outputs).square().sum(dim=1)
        on_right = right.project(self.inputs).square().sum(dim=1)
        return (on_left * self.weights[:, None]).T @ on_right

    @cached_property
    def balanced(self) -> Balanced:
        """Coordinates in which no example, large in d and small in a, drowns the others.

        With u = s o y, v = t o z and s o t = w / q, R(H) / q takes the dual of one side to the
        other unchanged; s and t are such that both metrics have diagonals of w |d|^2 |a|^2 / q.
        """
        outputs, inputs = self.outputs.squared_norms, self.inputs.squared_norms
        share = self.weights * outputs * inputs
        scale = float(share.max())
        root = (share / scale).sqrt() if scale > 0 else share
        s = torch.where(outputs > 0, root / outputs, 0.0)
        t = torch.where(inputs > 0, root / inputs, 0.0)
        kd = s[:, None] * self.outputs.squared_gram * s
        ka = t[:, None] * self.inputs.squared_gram * t
        return Balanced(kd, ka, s, t, root, scale)

    def leading(self) -> LeadingProduct:
        return self._leading

    @cached_property
    def _leading(self) -> LeadingProduct:
        b = self.balanced
        found = leading_triples(b.linear, b.kd @ b.root)
        if found.leading_value == 0.0:
            return self.void()
        right = found.right[:, 0] * torch.sign(found.right.sum())
        left = b.ka @ right.clamp_min(0)
        for _ in range(POLISHING_ROUNDS):
            right = b.kd @ left
            right = right / (right @ (b.ka @ right)).sqrt()
            left = b.ka @ right
        # all terms are nonnegative here, so sigma has no cancellation; the solve's own has some
        sigma = (left @ (b.kd @ left)).sqrt()
        return LeadingProduct(
            float(sigma) * b.scale,
            SampleFactor(self.outputs, b.s * left / sigma),
            SampleFactor(self.inputs, b.t * right),
            found.rounds + POLISHING_ROUNDS,
            found.residual,
        )

    def spectrum(self, k: int | None) -> Tensor:
        if k is not None and 4 * k < self.samples.n_examples:
            return self._leading_values(k)
        b = self.balanced
        values: Tensor = torch.linalg.svdvals(_root(b.kd) @ _root(b.ka).T) * b.scale
        m, n = self.shape
        return values.cpu()[: min(m * m, n * n)][:k]

    def _leading_values(self, k: int) -> Tensor:
        b = self.balanced

        def draw(generator: torch.Generator) -> Tensor:
            noise = torch.randn(len(b.root), dtype=torch.float64, generator=generator)
            return b.kd @ noise.to(b.kd.device)

        values = repeated_triples(b.linear, draw, k).values
        values *= b.scale
        values[:1] = self._leading.singular_value
        return values


@dataclass(frozen=True)
class Balanced:
    """The metrics s Kd s and t Ka t, their scalings, the examples' shares of Tr H, and q."""

    kd: Tensor
    ka: Tensor
    s: Tensor
    t: Tensor
    root: Tensor
    scale: float

    @property
    def linear(self) -> LinearMap:
        """R(H) / q between the two metrics."""
        return LinearMap(_unchanged, _unchanged, Space(self.kd), Space(self.ka))


def _weighted(rows: Rows, weights: Tensor) -> Factor:
    """sum_i u_i sum_c x_ic x_ic^T, PSD up to rounding, or of any sign."""
    negative = float(weights.min())
    if negative < -ROUNDING * float(weights.abs().max()):
        return MatrixFactor(rows.outer_sum(weights))
    return SampleFactor(rows, weights.clamp_min(0) if negative < 0 else weights)


def _unchanged(dual: Tensor) -> Tensor:
    return dual


def _root(gram: Tensor) -> Tensor:
    """K^{1/2} up to a rotation: diag(lambda)^{1/2} Q^T."""
    values, vectors = eigh_descending(gram)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T
