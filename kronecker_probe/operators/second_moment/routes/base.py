"""The contract of a route: what a second moment needs, computed in one way."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.gradients.samples.base import FactoredSamples, GradientSamples
from kronecker_probe.operators.factors.factor import Eigenbasis, Factor, MatrixFactor
from kronecker_probe.operators.factors.vectors import Rows
from kronecker_probe.operators.second_moment.kernels.base import Kernels
from kronecker_probe.operators.second_moment.kernels.choose import kernels_for
from kronecker_probe.operators.second_moment.kernels.vectors import vectors
from kronecker_probe.table.codes import ReasonCode

# Singular values that a route gives where the whole spectrum is out of reach.
DEFAULT_LEADING = 16

# Some of the examples.
Group: TypeAlias = slice | Tensor | Sequence[int]


@dataclass(frozen=True)
class LeadingProduct:
    """The leading singular triple of R(H).

    Attributes:
        singular_value: sigma_1; 0 when H = 0, and the factors are then void.
        left: U_1, unit Frobenius norm, PSD.
        right: V_1, unit Frobenius norm, PSD.
        rounds: Pairs of half steps used; 0 for a direct decomposition.
        residual: |R(H)^T u - sigma v| / sigma.
    """

    singular_value: float
    left: Factor
    right: Factor
    rounds: int
    residual: float


class Route(abc.ABC):
    """One way to compute the numbers of H = sum_i w_i sum_c vec(G_ic) vec(G_ic)^T."""

    name: ClassVar[str]

    def __init__(self, samples: GradientSamples) -> None:
        self.samples = samples
        self.weights = samples.weights
        self.shape = samples.shape
        self.kernels: Kernels = kernels_for(samples)

    def norm_squared(self) -> float:
        """|H|^2."""
        return float(self.weights @ (self.pair_products() @ self.weights))

    def pair_products(self) -> Tensor:
        """K_ij = sum_cd <G_ic, G_jd>^2, float64 [N, N]."""
        return self._pairs

    @cached_property
    def _pairs(self) -> Tensor:
        return self.kernels.pair_products()

    @cached_property
    def left(self) -> Factor:
        """L = E[G G^T], [m, m]."""
        return self.step(0, None)

    @cached_property
    def right(self) -> Factor:
        """R = E[G^T G], [n, n]."""
        return self.step(1, None)

    @abc.abstractmethod
    def step(self, side: int, given: Factor | None) -> Factor:
        """E[G V G^T] (side 0) of symmetric V [n, n], or E[G^T V G] (side 1) of V [m, m].

        None is the identity.
        """

    def grouped_step(
        self, side: int, given: Factor | None, groups: Sequence[Group]
    ) -> list[Factor]:
        """The half step of each group of examples by itself, with the weights as they are."""
        matrix = None if given is None else given.matrix
        parts = (kernels_for(self.samples.subset(group)) for group in groups)
        return [MatrixFactor(part.step(side, matrix)) for part in parts]

    def grouped_forms(self, lefts: Tensor, rights: Tensor, groups: Sequence[Group]) -> Tensor:
        """sum_{i in group} w_i sum_c <G_ic, A_b G_ic C_e>, float64 [groups, B, E].

        Args:
            lefts: A, PSD, float64 [B, m, m].
            rights: C, PSD, float64 [E, n, n].
            groups: Examples of each group.
        """
        columns = []
        for right in rights:
            images = self.grouped_step(0, MatrixFactor(right), groups)
            stacked = torch.stack([image.matrix.flatten() for image in images])
            columns.append(stacked @ lefts.flatten(1).T)
        return torch.stack(columns, dim=2)

    def quadratic_forms(self, left: Factor | None, right: Factor | None) -> Tensor:
        """sum_c <G_ic, A G_ic C> of each example, without its weight, float64 [N]."""
        return self.kernels.quadratic_forms(
            None if left is None else left.matrix, None if right is None else right.matrix
        )

    @abc.abstractmethod
    def factor_inner(self, left: Factor, right: Factor) -> float:
        """<H, left kron right>."""

    @abc.abstractmethod
    def eigen_diagonal(self, left: Eigenbasis, right: Eigenbasis) -> Tensor:
        """diag((Q_L kron Q_R)^T H (Q_L kron Q_R)), float64 [r, s]."""

    @abc.abstractmethod
    def leading(self) -> LeadingProduct:
        """The leading Kronecker product."""

    @abc.abstractmethod
    def spectrum(self, k: int | None) -> Tensor:
        """The k largest singular values of R(H), float64 CPU, or all that the route can give."""

    def void(self) -> LeadingProduct:
        """The leading product of H = 0, whose factors L and R are zero."""
        return LeadingProduct(0.0, self.left, self.right, 0, 0.0)

    def kfac_factors(self) -> tuple[Factor, Factor]:
        """E[d d^T] and E[a a^T], expand form over shared positions.

        Raises:
            UnsupportedError: The samples have no factors.
        """
        s = self.samples
        if not isinstance(s, FactoredSamples):
            raise UnsupportedError(
                "K-FAC needs the inputs and output gradients of a linear or convolutional layer, "
                f"and {type(s).__name__} hold none; kp.capture finds them where the model has such "
                "a layer, and GradientSamples.from_factors takes your own.",
                ReasonCode.NO_FACTORS,
            )
        return self._outer_factors(*vectors(s), self._input_weights(s))

    def _input_weights(self, samples: FactoredSamples) -> Tensor:
        total = self.weights.sum() * samples.n_positions
        return self.weights / total if float(total) > 0 else self.weights

    def _outer_factors(
        self, outputs: Rows, inputs: Rows, input_weights: Tensor
    ) -> tuple[Factor, Factor]:
        """sum_i w_i sum d d^T and sum_i v_i sum a a^T."""
        return (
            MatrixFactor(outputs.outer_sum(self.weights)),
            MatrixFactor(inputs.outer_sum(input_weights)),
        )
