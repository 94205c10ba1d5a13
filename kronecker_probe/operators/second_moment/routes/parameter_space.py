"""Parameter space: m x m and n x n matrices, half steps over chunks of examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from kronecker_probe.gradients.samples.base import FactoredSamples, GradientSamples
from kronecker_probe.operators.factors.factor import Eigenbasis, Factor, MatrixFactor
from kronecker_probe.operators.second_moment.kernels.choose import ways_of
from kronecker_probe.operators.second_moment.kernels.factored import FactorKernels
from kronecker_probe.operators.second_moment.routes import alternation
from kronecker_probe.operators.second_moment.routes.alternation import iterates_in_float32
from kronecker_probe.operators.second_moment.routes.base import (
    DEFAULT_LEADING,
    Group,
    LeadingProduct,
    Route,
)

TINY = torch.finfo(torch.float64).tiny
# Images of half steps that are kept: inner products of other products with the same factor, and
# the next iteration, ask for them again.
KEPT_IMAGES = 4


@final
class ParameterSpace(Route):
    """R(H) V = E[G V G^T] and R(H)^T U = E[G^T U G], never forming H; any samples."""

    name: ClassVar[str] = "parameter"

    def __init__(self, samples: GradientSamples) -> None:
        super().__init__(samples)
        self._images: tuple[list[tuple[Factor, MatrixFactor]], ...] = ([], [])

    def step(self, side: int, given: Factor | None) -> MatrixFactor:
        if given is None:
            return MatrixFactor(self.kernels.step(side, None))
        if (image := _known(given, self._images[side])) is not None:
            return image
        if (scale := _identity_scale(given.matrix)) is not None:
            return MatrixFactor(scale * (self.right if side else self.left).matrix)
        image = MatrixFactor(self.kernels.step(side, given.matrix))
        self._images[side].append((given, image))
        del self._images[side][:-KEPT_IMAGES]
        return image

    def factor_inner(self, left: Factor, right: Factor) -> float:
        # a half step takes no more than the inner product, and serves others
        if (image := _known(left, self._images[1])) is not None:
            return image.inner(right)
        return self.step(0, right).inner(left)

    def grouped_forms(self, lefts: Tensor, rights: Tensor, groups: Sequence[Group]) -> Tensor:
        """As on every route; large layers of float32 samples multiply in float32.

        PSD factors make every term nonnegative, so that the sums keep seven digits.
        """
        if ways_of(self.kernels)["forms"] != "factors" or not isinstance(
            self.samples, FactoredSamples
        ):
            return super().grouped_forms(lefts, rights, groups)
        single = iterates_in_float32(self.kernels, self.samples)
        dtype = torch.float32 if single else torch.float64
        # factors of unit size, for float32 holds squares of small gradients only
        sizes = [x.flatten(1).abs().amax(dim=1).clamp_min(TINY) for x in (lefts, rights)]
        scaled = [
            (x / s[:, None, None]).to(dtype) for x, s in zip((lefts, rights), sizes, strict=True)
        ]
        forms = FactorKernels(self.samples).many_forms(*scaled)
        weighted = forms * self.weights[:, None, None]
        summed = torch.stack([weighted[group].sum(dim=0) for group in groups])
        return summed * sizes[0][:, None] * sizes[1]

    def eigen_diagonal(self, left: Eigenbasis, right: Eigenbasis) -> Tensor:
        return self.kernels.projected_diagonal(left.vectors, right.vectors)

    def leading(self) -> LeadingProduct:
        return alternation.leading(self) or self.void()

    def spectrum(self, k: int | None) -> Tensor:
        return alternation.spectrum(self, DEFAULT_LEADING if k is None else k)


def _known(factor: Factor, images: list[tuple[Factor, MatrixFactor]]) -> MatrixFactor | None:
    return next((image for one, image in images if one is factor), None)


def _identity_scale(matrix: Tensor) -> float | None:
    """c of c times the identity; None for any other matrix."""
    scale = float(matrix[0, 0])
    diagonal = matrix.diagonal()
    multiple = bool((diagonal == scale).all()) and int(matrix.count_nonzero()) == len(diagonal)
    return scale if multiple else None
