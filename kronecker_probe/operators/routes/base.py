"""The contract of a route: what a second moment needs, computed in one way."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.gradients.samples import FactoredSamples, GradientSamples
from kronecker_probe.operators.factors import Eigenbasis, Factor, MatrixFactor
from kronecker_probe.operators.routes.kernels import Kernels, kernels_for
from kronecker_probe.operators.rows import Rows

# Singular values that a route gives where the whole spectrum is out of reach.
DEFAULT_LEADING = 16


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

    @abc.abstractmethod
    def norm_squared(self) -> float:
        """|H|^2."""

    @cached_property
    def left(self) -> Factor:
        """L = E[G G^T], [m, m]."""
        return self._left_factor()

    @cached_property
    def right(self) -> Factor:
        """R = E[G^T G], [n, n]."""
        return self._right_factor()

    @abc.abstractmethod
    def _left_factor(self) -> Factor: ...

    @abc.abstractmethod
    def _right_factor(self) -> Factor: ...

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
                "K-FAC needs layer inputs and output gradients, and these samples hold only "
                "gradient matrices; use GradientSamples.from_factors or kp.capture."
            )
        # a position is a vector like a column is: both sum within one datum
        outputs = Rows(s.output_grads.flatten(1, 2))
        inputs = Rows(s.inputs)
        return self._outer_factors(outputs, inputs, self._input_weights(s))

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
