"""All sums over gradient samples, whatever holds the samples."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kronecker_probe.gradients.samples.base import GradientSamples
from kronecker_probe.linalg.gram import chunk_rows
from kronecker_probe.linalg.rearrangement import rearrange
from kronecker_probe.operators.second_moment.cost_model import Costs

# What the products of some examples read: d and a, tokens and d, or G.
Parts: TypeAlias = tuple[Tensor, ...]


class Kernels(abc.ABC):
    """The sums over one set of samples; no other code reads what samples are held in.

    Matrices are symmetric; ``None`` in place of one means the identity. The products run in the
    dtype of the matrix given (float64 for None), float32 for iterations that are certified in
    float64 afterwards; sums over examples are float64 always.
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

    def step(self, side: int, given: Tensor | None, sign: int = 1) -> Tensor:
        """:meth:`left_step` (side 0) or :meth:`right_step` (side 1)."""
        return self.right_step(given, sign) if side else self.left_step(given, sign)

    @abc.abstractmethod
    def quadratic_forms(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """sum_c <G_ic, A G_ic C> of each example, without its weight, float64 [N]."""

    @abc.abstractmethod
    def projected_diagonal(self, left_basis: Tensor | None, right_basis: Tensor | None) -> Tensor:
        """sum_i w_i sum_c (Q_L^T G Q_R)^{o2}, float64 [r, s]."""

    @abc.abstractmethod
    def costs(self) -> Costs:
        """The work that each of these takes."""

    @abc.abstractmethod
    def _read(self) -> Iterator[tuple[slice, Parts]]:
        """The examples in ranges that fit one chunk, float64."""

    @abc.abstractmethod
    def _coefficients(self, parts: Parts, x: Tensor) -> Tensor:
        """<G_ic, x_b> of some examples, float64 [b, k, C]."""

    @abc.abstractmethod
    def _combine(self, parts: Parts, c: Tensor, out: Tensor) -> None:
        """Add sum_ic c_bic G_ic of ``c`` [b, k, C] to ``out`` [b, m, n]."""

    def coefficients(self, x: Tensor) -> Tensor:
        """<G_ic, x_b> of float64 ``x`` [b, m, n], float64 [b, N, C]."""
        found = [self._coefficients(parts, x) for _, parts in self._read()]
        return torch.cat(found, dim=1)

    def combine(self, c: Tensor) -> Tensor:
        """sum_ic c_bic G_ic of float64 ``c`` [b, N, C], float64 [b, m, n]."""
        out = c.new_zeros(len(c), *self.shape)
        for part, parts in self._read():
            self._combine(parts, c[:, part], out)
        return out

    def apply(self, x: Tensor) -> Tensor:
        """sum_i w_i sum_c G <G, x> of float64 ``x`` [b, m, n]."""
        out = x.new_zeros(x.shape)
        for part, parts in self._read():
            c = self._coefficients(parts, x) * self.weights[part, None]
            self._combine(parts, c, out)
        return out

    def elementwise_forms(
        self, values: Tensor, left_basis: Tensor | None, right_basis: Tensor | None
    ) -> Tensor:
        """sum_c <D, (Q_L^T G_ic Q_R)^{o2}> of each example, float64 [N], of D [r, s]."""

        def form(g: Tensor) -> Tensor:
            g = g if left_basis is None else left_basis.T @ g
            g = g if right_basis is None else g @ right_basis
            return (g.square() * values).sum(dim=(1, 2, 3))

        return self.over_matrices(form)

    def energies(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        """Row and column sums of sum_c (Q_L^T G_ic Q_R)^{o2}, float64 [N, r + s]."""

        def sums(g: Tensor) -> Tensor:
            squares = (left_basis.T @ g @ right_basis).square().sum(dim=1)
            return torch.cat([squares.sum(dim=2), squares.sum(dim=1)], dim=1)

        return self.over_matrices(sums)

    def diagonal_pairs(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """<D_i, D> and |D_i|^2 of the diagonals D_i = sum_c G_ic o G_ic, D = sum_i weights_i D_i.

        Both float64 [N].
        """
        mean = torch.zeros(self.shape, dtype=torch.float64, device=weights.device)
        for part in self._matrix_ranges():
            squares = self.samples.matrices(part.start, part.stop).square().sum(dim=1)
            mean += (squares * weights[part, None, None]).sum(dim=0)
        norms = self.over_matrices(lambda g: g.square().sum(dim=1).square().sum(dim=(1, 2)))
        return self.elementwise_forms(mean, None, None), norms

    def factor_energies(self) -> list[Tensor]:
        """|d_i|^2 and |a_i|^2 of each example, float64 [N]; none without factors."""
        return []

    def rearranged(self) -> Tensor:
        """R(H), float64 [m^2, n^2]."""
        size = self.shape[0] * self.shape[1]
        out = torch.zeros(size, size, dtype=torch.float64, device=self.weights.device)
        for part in self._matrix_ranges():
            g = self.samples.matrices(part.start, part.stop).flatten(2)
            weighted = (g * self.weights[part, None, None]).flatten(0, 1)
            out.addmm_(g.flatten(0, 1).T, weighted)
        return rearrange(out, self.shape)

    def over_matrices(self, form: Callable[[Tensor], Tensor]) -> Tensor:
        """``form`` of G [k, C, m, n], chunk by chunk, float64 [N, ...]."""
        out: Tensor | None = None
        for part in self._matrix_ranges():
            found = form(self.samples.matrices(part.start, part.stop))
            if out is None:
                out = found.new_empty(self.samples.n_examples, *found.shape[1:])
            out[part] = found
        assert out is not None
        return out

    def _matrix_ranges(self) -> Iterator[slice]:
        m, n = self.shape
        return self._ranges(chunk_rows(self.samples.n_columns * m * n))

    def _ranges(self, step: int) -> Iterator[slice]:
        """Consecutive ranges of the examples."""
        count = self.samples.n_examples
        return (slice(i, min(i + step, count)) for i in range(0, count, step))

    @abc.abstractmethod
    def pair_steps(self) -> tuple[int, int]:
        """Examples of a block of rows and of a block of columns of the pair products."""

    def products(self, rows: slice, other: Kernels, columns: slice) -> Tensor:
        """<G_ic, G'_jd> of two ranges of examples, float64 [I, C, J, C']."""
        one = self.samples.matrices(rows.start, rows.stop)
        return products_of(one, other.samples.matrices(columns.start, columns.stop))

    def pair_block(self, rows: slice, other: Kernels, columns: slice) -> Tensor:
        """sum_cd <G_ic, G'_jd>^2 of two ranges of examples, float64 [I, J]."""
        squares = self.products(rows, other, columns).square_()
        single = squares.shape[1] == squares.shape[3] == 1
        return squares[:, 0, :, 0] if single else squares.sum(dim=(1, 3))

    def gram(self) -> Tensor:
        """<G_ic, G_jd>, float64 [N C, N C]; one triangle is computed."""
        count, c = self.samples.n_examples, self.samples.n_columns
        out = torch.empty(count, c, count, c, dtype=torch.float64, device=self.weights.device)
        for rows, columns in self._pair_blocks():
            block = self.products(rows, self, columns)
            out[columns, :, rows] = block.permute(2, 3, 0, 1)
            out[rows, :, columns] = block
        return out.view(count * c, count * c)

    def _pair_blocks(self) -> Iterator[tuple[slice, slice]]:
        """Ranges of rows and columns that cover one triangle of the pairs."""
        wide, narrow = self.pair_steps()
        for rows in self._ranges(wide):
            for j in range(rows.start, self.samples.n_examples, narrow):
                columns = slice(j, min(j + narrow, self.samples.n_examples))
                yield slice(rows.start, min(rows.stop, columns.stop)), columns

    def pair_products(self) -> Tensor:
        """K_ij = sum_cd <G_ic, G_jd>^2, float64 [N, N]; one triangle is computed."""
        count = self.samples.n_examples
        out = torch.empty(count, count, dtype=torch.float64, device=self.weights.device)
        for rows, columns in self._pair_blocks():
            block = self.pair_block(rows, self, columns)
            out[columns, rows] = block.T
            out[rows, columns] = block
        return out

    def cross_products(self, other: Kernels) -> Tensor:
        """sum_cd <G_ic, G'_jd>^2 with the examples of ``other``, float64 [N, N']."""
        count, others = self.samples.n_examples, other.samples.n_examples
        out = torch.empty(count, others, dtype=torch.float64, device=self.weights.device)
        for rows in self._ranges(self.pair_steps()[0]):
            for columns in other._ranges(other.pair_steps()[1]):
                out[rows, columns] = self.pair_block(rows, other, columns)
        return out


def products_of(one: Tensor, two: Tensor) -> Tensor:
    """<x_ic, y_jd> of [I, C, ...] and [J, C', ...], float64 [I, C, J, C']."""
    products = one.flatten(0, 1).flatten(1) @ two.flatten(0, 1).flatten(1).T
    return products.view(*one.shape[:2], *two.shape[:2])


KernelsOf: TypeAlias = Callable[[Any], Kernels]
