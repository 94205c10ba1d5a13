"""Half steps E[G V G^T] and E[G^T U G] within the ranges of L and R, for fixed-point iterations."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kronecker_probe.gradients.samples.base import FactoredSamples
from kronecker_probe.operators.factors.factor import Factor, MatrixFactor, SampleFactor
from kronecker_probe.operators.factors.vectors import Rows
from kronecker_probe.operators.second_moment.kernels.choose import kernels_for
from kronecker_probe.operators.second_moment.kernels.vectors import transformed
from kronecker_probe.operators.second_moment.routes.alternation import iterates_in_float32
from kronecker_probe.operators.second_moment.target import SecondMoment

# Eigenvalues of L and R below this share of the largest are rounding of Grams.
SMALLEST_SHARE = 1e-13
# Likewise of samples in float32: softmax gradients p - y of a fitted model leave about 1e-9 along
# their null direction, because they are differences of numbers near one.
SINGLE_SHARE = 4e-9
# They leave more the better the fit, but then far below the rest: a fall to a share of the one
# before, from which on a small eigenvalue is null too.
GAP, GAP_SHARE = 1e-4, 1e-6
# In half precision rounding of the entries, about eps^2 of the largest eigenvalue, is more.
ROUNDING_SHARES = 4.0


@dataclass(frozen=True)
class Step:
    """The image of a half step.

    Attributes:
        reduced: In the coordinates of the range, float64 [r, r].
        lift: What takes it to those of the parameter.
    """

    reduced: Tensor
    lift: Callable[[], Factor]

    @property
    def factor(self) -> Factor:
        """In the coordinates of the parameter, [k, k], in sample space where the target is."""
        return self.lift()


class HalfSteps(abc.ABC):
    """Half steps in coordinates T_L [m, r], T_R [n, s] of the ranges of L and R.

    G' = T_L^T G T_R loses nothing but rounding, and its factors have full rank: powers of them
    need no cutoff. Whitened, T_L = Q_L lambda^{-1/2}, both of its partial traces are I; else T_L
    is the eigenbasis itself.
    """

    @property
    @abc.abstractmethod
    def ranks(self) -> tuple[int, int]:
        """(r, s)."""

    single = False
    """Whether float32 products are worth their while, and the samples hold no more than that."""

    @abc.abstractmethod
    def left(self, right: Tensor) -> Step:
        """E[G' V G'^T] of ``right`` V [s, s], its products in that dtype, its sums in float64."""

    @abc.abstractmethod
    def right(self, left: Tensor) -> Step:
        """E[G'^T U G'] of ``left`` U [r, r], likewise."""


def half_steps(target: SecondMoment, q: float) -> HalfSteps:
    """Half steps of H / Tr H for powers q - 1 within its ranges; H must not be zero.

    Negative powers enlarge what is small, so for q < 1 the ranges leave out what the dtype of the
    samples does not resolve. For q = 0, where any linear map passes through, they are whitened.
    """
    left, right = target.left_factor, target.right_factor
    scale = 1.0 / target.trace()
    tensors = target.samples.tensors
    sides = [
        Side.of(factor, tensor.dtype if q < 1 else torch.float64, q == 0)
        for factor, tensor in ((left, tensors[0]), (right, tensors[-1]))
    ]
    if isinstance(left, SampleFactor) and isinstance(right, SampleFactor):
        weights = target.samples.weights * scale
        return SampleHalfSteps(left.rows, right.rows, weights, sides[0], sides[1])
    if isinstance(target.samples, FactoredSamples):
        return FactoredHalfSteps(target.samples, scale, sides[0].transform, sides[1].transform)
    return ParameterHalfSteps(target, scale, sides[0].transform, sides[1].transform)


def _rank(values: Tensor, dtype: torch.dtype) -> int:
    """How many of the descending eigenvalues of L or R the samples in ``dtype`` resolve."""
    shares = values / values[0]
    if dtype == torch.float64 or not dtype.is_floating_point:
        return int((shares > SMALLEST_SHARE).sum())
    resolved = shares > max(SINGLE_SHARE, ROUNDING_SHARES * torch.finfo(dtype).eps ** 2)
    resolved[1:] &= (shares[1:] > GAP_SHARE) | (shares[1:] > GAP * shares[:-1])
    return int(resolved.long().cumprod(0).sum())


class Side:
    """The range of one factor: its eigenbasis cut at the rank, with the scale of each column."""

    def __init__(self, factor: Factor, rank: int, scales: Tensor) -> None:
        self.factor = factor
        self.rank = rank
        self.scales = scales

    @staticmethod
    def of(factor: Factor, dtype: torch.dtype, whitened: bool) -> Side:
        values = factor.eigen().values
        rank = _rank(values, dtype)
        top = values[:rank] / values.sum()
        return Side(factor, rank, top.rsqrt() if whitened else torch.ones_like(top))

    @property
    def transform(self) -> Tensor:
        """T, float64 [k, r]."""
        return self.factor.eigen().basis.vectors[:, : self.rank] * self.scales

    def project(self, rows: Rows) -> Tensor:
        """X T, float64 [N, C, r]."""
        return self.factor.eigen().basis.project(rows)[..., : self.rank] * self.scales


@final
class SampleHalfSteps(HalfSteps):
    """Unshared gradient samples: an image is a vector of N weights on d d^T or a a^T.

    Args:
        outputs: d.
        inputs: a.
        weights: float64 [N].
        left: The range of L.
        right: The range of R.
    """

    def __init__(
        self, outputs: Rows, inputs: Rows, weights: Tensor, left: Side, right: Side
    ) -> None:
        self._rows = outputs, inputs
        self._weights = weights
        self._values = left.project(outputs), right.project(inputs)

    @property
    def ranks(self) -> tuple[int, int]:
        return self._values[0].shape[2], self._values[1].shape[2]

    def left(self, right: Tensor) -> Step:
        return self._image(0, right)

    def right(self, left: Tensor) -> Step:
        return self._image(1, left)

    def _image(self, side: int, matrix: Tensor) -> Step:
        known, own, matrix = self._values[1 - side], self._values[side], matrix.double()
        weights = self._weights * ((known @ matrix) * known).sum(dim=(1, 2))
        weighted = (own * weights[:, None, None]).flatten(0, 1)
        reduced = own.flatten(0, 1).T @ weighted
        return Step(reduced, lambda: SampleFactor(self._rows[side], weights))


@final
class FactoredHalfSteps(HalfSteps):
    """Shared gradient samples, whose factors d T_L and a T_R take the place of d and a.

    Args:
        samples: The gradient samples.
        scale: In front of H.
        left: T_L.
        right: T_R.
    """

    def __init__(self, samples: FactoredSamples, scale: float, left: Tensor, right: Tensor) -> None:
        self._kernels = kernels_for(transformed(samples, left, right, scale))
        self._transforms = left, right
        self.single = iterates_in_float32(self._kernels, samples)

    @property
    def ranks(self) -> tuple[int, int]:
        return self._transforms[0].shape[1], self._transforms[1].shape[1]

    def left(self, right: Tensor) -> Step:
        return self._step(self._kernels.left_step(right), self._transforms[0])

    def right(self, left: Tensor) -> Step:
        return self._step(self._kernels.right_step(left), self._transforms[1])

    def _step(self, reduced: Tensor, transform: Tensor) -> Step:
        # the columns of T are orthogonal, so this inverts its transpose on the range
        lifting = transform / transform.square().sum(dim=0)
        return Step(reduced, lambda: MatrixFactor(lifting @ reduced @ lifting.T))


@final
class ParameterHalfSteps(HalfSteps):
    """Gradient samples that have no such factors, through m x m and n x n matrices.

    Args:
        target: H.
        scale: In front of it.
        left: T_L.
        right: T_R.
    """

    def __init__(self, target: SecondMoment, scale: float, left: Tensor, right: Tensor) -> None:
        self._target = target
        self._scale = scale
        self._left = left
        self._right = right

    @property
    def ranks(self) -> tuple[int, int]:
        return self._left.shape[1], self._right.shape[1]

    def left(self, right: Tensor) -> Step:
        full = self._target.left_step(self._right @ right.double() @ self._right.T)
        return self._step(full, self._left)

    def right(self, left: Tensor) -> Step:
        full = self._target.right_step(self._left @ left.double() @ self._left.T)
        return self._step(full, self._right)

    def _step(self, full: Factor, transform: Tensor) -> Step:
        matrix = full.matrix * self._scale
        return Step(transform.T @ matrix @ transform, lambda: MatrixFactor(matrix))
