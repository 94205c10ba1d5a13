"""The sums over samples that parameter space needs, whatever holds the samples."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kronecker_probe.gradients.samples.base import GradientSamples
from kronecker_probe.operators.second_moment.cost_model import Costs

# Data of one block of pair products, where nothing is known about the samples.
PAIR_ROWS = 64


class Kernels(abc.ABC):
    """The sums that parameter space needs, over one set of samples.

    Matrices are symmetric; ``None`` in place of one means the identity. The products run in the
    dtype of the matrix given (float64 for None), float32 for iterations that are certified in
    float64 afterwards; sums over data are float64 always.
    """

    def __init__(self, samples: GradientSamples) -> None:
        self.samples = samples
        self.weights = samples.weights
        self.shape = samples.shape

    @abc.abstractmethod
    def left_step(self, right: Tensor | None, sign: int = 1) -> Tensor:
        """sum_i w_i sum_c G V G^T, float64 [m, m], of symmetric V, or of skew V for sign -1."""

    @abc.abstractmethod
    def right_step(self, left: Tensor | None, sign: int = 1) -> Tensor:
        """sum_i w_i sum_c G^T U G, float64 [n, n], of symmetric U, or of skew U for sign -1."""

    @abc.abstractmethod
    def quadratic_forms(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """sum_c <G_ic, A G_ic C> of each datum, without its weight, float64 [N]."""

    @abc.abstractmethod
    def projected_diagonal(self, left_basis: Tensor | None, right_basis: Tensor | None) -> Tensor:
        """sum_i w_i sum_c (Q_L^T G Q_R)^{o2}, float64 [r, s]."""

    @abc.abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """sum_i w_i sum_c G <G, x> of float64 ``x`` [b, m, n]."""

    @abc.abstractmethod
    def costs(self) -> Costs:
        """The work that each of these takes."""

    def pair_steps(self) -> tuple[int, int]:
        """Data of a block of rows and of a block of columns of the pair products."""
        return PAIR_ROWS, PAIR_ROWS

    def pair_block(self, rows: slice, other: Kernels, columns: slice) -> Tensor:
        """sum_cd <G_ic, G'_jd>^2 of two ranges of data, float64 [I, J]."""
        one = self.samples.matrices(rows.start, rows.stop)
        two = other.samples.matrices(columns.start, columns.stop)
        return squared_products(one, two)

    def pair_products(self) -> Tensor:
        """K_ij = sum_cd <G_ic, G_jd>^2, float64 [N, N]; one triangle is computed."""
        count = self.samples.n_examples
        out = torch.empty(count, count, dtype=torch.float64, device=self.weights.device)
        wide, narrow = self.pair_steps()
        for i in range(0, count, wide):
            rows = slice(i, min(i + wide, count))
            for j in range(i, count, narrow):
                columns = slice(j, min(j + narrow, count))
                used = slice(i, min(rows.stop, columns.stop))
                block = self.pair_block(used, self, columns)
                out[columns, used] = block.T
                out[used, columns] = block
        return out

    def cross_products(self, other: Kernels) -> Tensor:
        """sum_cd <G_ic, G'_jd>^2 with the data of ``other``, float64 [N, N']."""
        count, others = self.samples.n_examples, other.samples.n_examples
        out = torch.empty(count, others, dtype=torch.float64, device=self.weights.device)
        wide, narrow = self.pair_steps()[0], other.pair_steps()[1]
        for i in range(0, count, wide):
            rows = slice(i, min(i + wide, count))
            for j in range(0, others, narrow):
                columns = slice(j, min(j + narrow, others))
                out[rows, columns] = self.pair_block(rows, other, columns)
        return out


def squared_products(one: Tensor, two: Tensor) -> Tensor:
    """sum_cd <x_ic, y_jd>^2 of [I, C, ...] and [J, C', ...], float64 [I, J]."""
    products = one.flatten(0, 1).flatten(1) @ two.flatten(0, 1).flatten(1).T
    products = products.square_().view(*one.shape[:2], *two.shape[:2])
    return products[:, 0, :, 0] if one.shape[1] == two.shape[1] == 1 else products.sum(dim=(1, 3))


KernelsOf: TypeAlias = Callable[[Any], Kernels]
