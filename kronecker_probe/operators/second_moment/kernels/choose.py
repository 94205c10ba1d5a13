"""Which kernels serve which samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from torch import Tensor

from kronecker_probe.gradients.samples.base import (
    EmbeddingSamples,
    FactoredSamples,
    GradientSamples,
    MatrixSamples,
)
from kronecker_probe.operators.second_moment.cost_model import OPERATIONS, Costs, Work, machine_of
from kronecker_probe.operators.second_moment.kernels.base import Kernels, KernelsOf, Parts
from kronecker_probe.operators.second_moment.kernels.factored import FactorKernels
from kronecker_probe.operators.second_moment.kernels.matrix import MatrixKernels
from kronecker_probe.operators.second_moment.kernels.tokens import EmbeddingKernels


def kernels_for(samples: GradientSamples) -> Kernels:
    """The kernels of these samples."""
    return KERNELS[type(samples)](samples)


def cross_products(one: GradientSamples, other: GradientSamples) -> Tensor:
    """sum_cd <G_ic, G'_jd>^2 of two sets of samples, float64 [N, N']."""
    if isinstance(one, FactoredSamples) and isinstance(other, FactoredSamples):
        m, n = one.shape
        positions = one.n_positions * other.n_positions
        kind = FactorKernels if positions == 1 or positions * (m + n) <= m * n else MatrixKernels
        return kind(one).cross_products(kind(other))
    return kernels_for(one).cross_products(kernels_for(other))


def ways_of(kernels: Kernels) -> dict[str, str]:
    """How each operation is computed: "factors", or "matrices" formed in chunks."""
    if isinstance(kernels, SharedKernels):
        return dict(kernels.ways)
    way = "matrices" if isinstance(kernels, MatrixKernels) else "factors"
    return dict.fromkeys(OPERATIONS, way)


@final
class SharedKernels(Kernels):
    """Each sum in its cheaper way: from factors, or from the matrices that they form.

    A product <G, G'> takes T^2 (m + n) operations from factors and m n from matrices, so norms
    prefer matrices beyond T^2 = m n / (m + n); half steps keep m x m and n x n products in both
    ways and turn later.
    """

    def __init__(self, samples: FactoredSamples) -> None:
        super().__init__(samples)
        self._of = {"factors": FactorKernels(samples), "matrices": MatrixKernels(samples)}
        machine = machine_of(samples.device)
        costs = {way: kernels.costs() for way, kernels in self._of.items()}

        def work(way: str, operation: str) -> Work:
            found: Work = getattr(costs[way], operation)
            return found

        self.ways = {
            operation: min(costs, key=lambda way: work(way, operation).seconds(machine))
            for operation in OPERATIONS
        }
        chosen = {operation: work(way, operation) for operation, way in self.ways.items()}
        nbytes = max(costs[way].nbytes for way in self.ways.values())
        self._costs = Costs(nbytes=nbytes, **chosen)

    def left_step(self, right: Tensor | None, sign: int = 1) -> Tensor:
        return self._of[self.ways["left"]].left_step(right, sign)

    def right_step(self, left: Tensor | None, sign: int = 1) -> Tensor:
        return self._of[self.ways["right"]].right_step(left, sign)

    def quadratic_forms(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        return self._of[self.ways["forms"]].quadratic_forms(left, right)

    def projected_diagonal(self, left_basis: Tensor | None, right_basis: Tensor | None) -> Tensor:
        return self._of[self.ways["diagonal"]].projected_diagonal(left_basis, right_basis)

    def _read(self) -> Iterator[tuple[slice, Parts]]:
        return self._of[self.ways["apply"]]._read()

    def _coefficients(self, parts: Parts, x: Tensor) -> Tensor:
        return self._of[self.ways["apply"]]._coefficients(parts, x)

    def _combine(self, parts: Parts, c: Tensor, out: Tensor) -> None:
        self._of[self.ways["apply"]]._combine(parts, c, out)

    def factor_energies(self) -> list[Tensor]:
        return self._of["factors"].factor_energies()

    def pair_steps(self) -> tuple[int, int]:
        return self._of[self.ways["pairs"]].pair_steps()

    def products(self, rows: slice, other: Kernels, columns: slice) -> Tensor:
        two = other._of[self.ways["pairs"]] if isinstance(other, SharedKernels) else other
        return self._of[self.ways["pairs"]].products(rows, two, columns)

    def pair_products(self) -> Tensor:
        return self._of[self.ways["pairs"]].pair_products()

    def costs(self) -> Costs:
        return self._costs


def _of_factors(samples: FactoredSamples) -> Kernels:
    return FactorKernels(samples) if samples.n_positions == 1 else SharedKernels(samples)


# class of samples -> its kernels
KERNELS: dict[type[GradientSamples], KernelsOf] = {
    FactoredSamples: _of_factors,
    MatrixSamples: MatrixKernels,
    EmbeddingSamples: EmbeddingKernels,
}
