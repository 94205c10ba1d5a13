"""Sums over samples from the gradient matrices themselves, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from kronecker_probe.gradients.samples.base import FactoredSamples, GradientSamples, MatrixSamples
from kronecker_probe.linalg.gram import chunk_rows
from kronecker_probe.linalg.symmetric import add_upper, half_of, mirror, panel_share, times_half
from kronecker_probe.operators.second_moment.cost_model import Costs, Work, product
from kronecker_probe.operators.second_moment.kernels.base import Kernels, Parts, products_of

# Matrices formed from factors are kept from one sum to the next up to this size.
HELD_BYTES = 1 << 28
# Rows of a block of pair products, in chunks: a larger block has its partners formed less often.
WIDE = 4


@final
class MatrixKernels(Kernels):
    """From G itself; formed from factors, it is kept where it is small."""

    def __init__(self, samples: GradientSamples) -> None:
        super().__init__(samples)
        m, n = samples.shape
        self._per_example = samples.n_columns * m * n
        self._formed = not isinstance(samples, MatrixSamples)
        self._holds = self._formed and 8 * self._per_example * samples.n_examples <= HELD_BYTES
        self._block: tuple[slice, Tensor] | None = None

    @cached_property
    def _held(self) -> Tensor:
        count = self.samples.n_examples
        shape = (count, self.samples.n_columns, *self.shape)
        out = torch.empty(shape, dtype=torch.float64, device=self.weights.device)
        for part in self._matrix_ranges():
            out[part] = self.samples.matrices(part.start, part.stop)
        return out

    def _matrices(self, part: slice) -> Tensor:
        return self._held[part] if self._holds else self.samples.matrices(part.start, part.stop)

    def _chunks(self, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
        """(w [k], G [k, C, m, n])."""
        for part, (g,) in self._read():
            yield self.weights[part].to(dtype), g.to(dtype)

    def left_step(self, right: Tensor | None, sign: int = 1) -> Tensor:
        m, n = self.shape
        dtype = torch.float64 if right is None else right.dtype
        out = torch.zeros(m, m, dtype=torch.float64, device=self.weights.device)
        halved = right is not None and _halves_first(n, m)
        factor = half_of(right) if right is not None and halved else right
        for w, g in self._chunks(dtype):
            image = _rows(_scaled(_times(g, factor, halved), w))
            rows = _rows(g)
            if halved:
                out += image @ rows.T
            else:
                add_upper(out, image.T, rows.T)
        return out + sign * out.T if halved else mirror(out, sign)

    def right_step(self, left: Tensor | None, sign: int = 1) -> Tensor:
        n = self.shape[1]
        dtype = torch.float64 if left is None else left.dtype
        out = torch.zeros(n, n, dtype=torch.float64, device=self.weights.device)
        for w, g in self._chunks(dtype):
            image = _scaled(g if left is None else left @ g, w)
            add_upper(out, g.reshape(-1, n), image.reshape(-1, n))
        return mirror(out, sign)

    def quadratic_forms(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        parts = []
        for _, g in self._chunks():
            image = g if left is None else left @ g
            image = image if right is None else image @ right
            parts.append((image * g).sum(dim=(1, 2, 3)))
        return torch.cat(parts)

    def projected_diagonal(self, left_basis: Tensor | None, right_basis: Tensor | None) -> Tensor:
        total: Tensor | None = None
        for w, g in self._chunks():
            rotated = g if right_basis is None else g @ right_basis
            rotated = rotated if left_basis is None else left_basis.T @ rotated
            total = sum_of_squares(total, rotated, w)
        assert total is not None
        return total

    def _read(self) -> Iterator[tuple[slice, Parts]]:
        for part in self._ranges(chunk_rows(2 * self._per_example)):
            yield part, (self._matrices(part),)

    def _coefficients(self, parts: Parts, x: Tensor) -> Tensor:
        (g,) = parts
        return (g.flatten(2) @ x.flatten(1).T).permute(2, 0, 1)

    def _combine(self, parts: Parts, c: Tensor, out: Tensor) -> None:
        columns = parts[0].flatten(0, 1).flatten(1)
        out.flatten(1).addmm_(c.flatten(1), columns)

    def pair_steps(self) -> tuple[int, int]:
        step = chunk_rows(self._per_example)
        if self._holds or self._given_in_float64:
            return self.samples.n_examples, max(step, -(-self.samples.n_examples // 8))
        return WIDE * step, step

    @property
    def _given_in_float64(self) -> bool:
        samples = self.samples
        return isinstance(samples, MatrixSamples) and samples.values.dtype == torch.float64

    def products(self, rows: slice, other: Kernels, columns: slice) -> Tensor:
        if isinstance(other, MatrixKernels):
            return products_of(self._pair_matrices(rows), other._matrices(columns))
        others = other.samples.matrices(columns.start, columns.stop)
        return products_of(self._pair_matrices(rows), others)

    def _pair_matrices(self, rows: slice) -> Tensor:
        if self._holds:
            return self._held[rows]
        # one block of rows meets many blocks of columns
        if self._block is None or self._block[0] != rows:
            self._block = rows, self._matrices(rows)
        return self._block[1]

    def pair_products(self) -> Tensor:
        found = super().pair_products()
        self._block = None
        return found

    def cross_products(self, other: Kernels) -> Tensor:
        found = super().cross_products(other)
        self._block = None
        return found

    def costs(self) -> Costs:
        (m, n), count = self.shape, self.samples.n_examples
        data = float(count * self.samples.n_columns)
        entries = data * m * n
        chunks = count / chunk_rows(2 * self._per_example)
        forming = Work()
        if isinstance(self.samples, FactoredSamples):
            forming = product(m, self.samples.n_positions, n, data) + Work(stream=12 * entries)
        once = forming * 0.1 if self._holds else forming  # kept, many sums share it
        passes = Work(stream=8 * 6 * entries, calls=12 * (chunks + 2)) + once
        onto_n, onto_m = product(m, n, n, data), product(n, m, m, data)
        first = onto_n * panel_share(n) + onto_m if _halves_first(n, m) else Work()
        second = onto_n + onto_m * panel_share(m)
        left = first if first.flops else second
        squares = Work(flops=float(data) ** 2 * m * n, stream=4 * float(data) ** 2)
        held = 8 * entries if self._holds else 0.0
        return Costs(
            left=left + passes,
            right=onto_m + onto_n * panel_share(n) + passes,
            forms=onto_n + onto_m + passes,
            diagonal=onto_n + onto_m + passes,
            pairs=squares + forming + passes * 0.2,
            apply=Work(stream=8 * 2 * entries, calls=6 * chunks) + once,
            nbytes=held + 8.0 * 4 * (m * m + n * n) + 1e8,
        )


def sum_of_squares(total: Tensor | None, g: Tensor, weights: Tensor) -> Tensor:
    """``total`` + sum_i w_i sum_c G^{o2} of ``g`` [k, C, r, s]."""
    flat = g.square().flatten(0, 1).flatten(1)
    summed = (weights.repeat_interleave(g.shape[1]) @ flat).view(g.shape[2:])
    return summed if total is None else total.add_(summed)


def _halves_first(inner: int, outer: int) -> bool:
    """Whether halving G V (inner size) saves more than halving the sum of outer products."""
    return inner > outer and panel_share(inner) < 1


def _times(g: Tensor, factor: Tensor | None, halved: bool) -> Tensor:
    if factor is None:
        return g
    return times_half(g, factor) if halved else g @ factor


def _scaled(g: Tensor, weights: Tensor) -> Tensor:
    return g * weights[:, None, None, None]


def _rows(g: Tensor) -> Tensor:
    """[m, k C n] of [k, C, m, n]."""
    return g.permute(2, 0, 1, 3).reshape(g.shape[2], -1)
