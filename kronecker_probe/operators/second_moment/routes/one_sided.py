"""What is left where the larger side's matrices do not fit: a large embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NoReturn, final

from torch import Tensor

from kronecker_probe.errors import MemoryBudgetError
from kronecker_probe.gradients.samples.base import FactoredSamples, GradientSamples
from kronecker_probe.linalg.memory import available_bytes
from kronecker_probe.operators.factors.factor import (
    Eigenbasis,
    Factor,
    IdentityFactor,
    MatrixFactor,
)
from kronecker_probe.operators.second_moment.kernels.choose import kernels_for
from kronecker_probe.operators.second_moment.routes.base import Group, LeadingProduct, Route


@final
class OneSided(Route):
    """Norm, trace, diagonal, the smaller side's factor, and inner products with given matrices.

    All else is refused.
    """

    name: ClassVar[str] = "one-sided"

    def step(self, side: int, given: Factor | None) -> Factor:
        self._check(side, given)
        return MatrixFactor(self.kernels.step(side, None))

    def grouped_step(
        self, side: int, given: Factor | None, groups: Sequence[Group]
    ) -> list[Factor]:
        self._check(side, given)
        return super().grouped_step(side, None, groups)

    def _check(self, side: int, given: Factor | None) -> None:
        if side != int(self._tall) or not _is_identity(given):
            self._refuse()

    def grouped_forms(self, lefts: Tensor, rights: Tensor, groups: Sequence[Group]) -> Tensor:
        self._refuse()

    def quadratic_forms(self, left: Factor | None, right: Factor | None) -> Tensor:
        large = left if self._tall else right
        if not (_is_identity(large) or isinstance(large, MatrixFactor)):
            self._refuse()  # it would be formed first
        matrices = [
            None if factor is None or isinstance(factor, IdentityFactor) else factor.matrix
            for factor in (left, right)
        ]
        return self.kernels.quadratic_forms(*matrices)

    def factor_inner(self, left: Factor, right: Factor) -> float:
        if not _is_identity(left if self._tall else right):
            return float(self.weights @ self.quadratic_forms(left, right))
        return right.inner(self.right) if self._tall else left.inner(self.left)

    def eigen_diagonal(self, left: Eigenbasis, right: Eigenbasis) -> Tensor:
        self._refuse()

    def leading(self) -> LeadingProduct:
        self._refuse()

    def spectrum(self, k: int | None) -> Tensor:
        self._refuse()

    def kfac_factors(self) -> tuple[Factor, Factor]:
        if isinstance(self.samples, FactoredSamples):
            self._refuse()
        return super().kfac_factors()  # which says why there are none

    @property
    def _tall(self) -> bool:
        return self.shape[0] > self.shape[1]

    def _refuse(self) -> NoReturn:
        m, n = self.shape
        size, small = ("left", "right") if self._tall else ("right", "left")
        k, device = max(m, n), self.samples.device
        raise MemoryBudgetError(
            f"The {size} side of this {m} x {n} layer has {k} x {k} matrices, of "
            f"{8e-9 * k * k:.2f} GB each, several of which do not fit in the "
            f"{available_bytes(device) / 1e9:.2f} GB that are free on {device}. What needs none "
            f"works: norm, trace, diagonal and {small} factor ('{small}-only', 'diagonal' and "
            "'identity' among the approximations)."
        )


def one_sided_bytes(samples: GradientSamples) -> float:
    """Predicted memory above the samples."""
    m, n = samples.shape
    pairs = kernels_for(samples).pair_steps()
    return (
        8.0 * (8 * min(m, n) ** 2 + 4 * m * n + samples.n_examples**2 + pairs[0] * pairs[1]) + 1e8
    )


def _is_identity(factor: Factor | None) -> bool:
    return factor is None or isinstance(factor, IdentityFactor)
