"""Sums over samples from the factors (d, a), without the gradient matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from kronecker_probe.gradients.samples.base import FactoredSamples
from kronecker_probe.linalg.gram import chunk_rows
from kronecker_probe.linalg.symmetric import add_upper, half_of, mirror, panel_share, times_half
from kronecker_probe.operators.second_moment.cost_model import Costs, Work, product
from kronecker_probe.operators.second_moment.kernels.base import Kernels, Parts
from kronecker_probe.operators.second_moment.kernels.matrix import sum_of_squares

# Chunks of a quarter of the usual size stay in the last cache, with their temporaries.
CACHED = 4


@final
class FactorKernels(Kernels):
    """From G = sum_t d_t a_t^T: T x T products of positions stand for m x n matrices."""

    samples: FactoredSamples

    def __init__(self, samples: FactoredSamples) -> None:
        super().__init__(samples)
        m, n = samples.shape
        c, t = samples.n_columns, samples.n_positions
        # elements of one example in float64, with the images of d and a and the T x T products
        self._per_example = 2 * c * t * m + 2 * t * n + (2 * t * t if t > 1 else 2)

    def _read(
        self, dtype: torch.dtype = torch.float64, extra: int = 0
    ) -> Iterator[tuple[slice, Parts]]:
        """d [k, C, T, m] and a [k, T, n], with room for ``extra`` elements per example."""
        s, cached = self.samples, CACHED if dtype == torch.float64 else 1
        for part in self._ranges(chunk_rows((self._per_example + extra) * cached)):
            yield part, (s.output_grads[part].to(dtype), s.inputs[part].to(dtype))

    def _chunks(self, dtype: torch.dtype = torch.float64, extra: int = 0) -> Iterator[Parts]:
        """(w [k, 1, 1], d [k, C, T, m], a [k, T, n])."""
        for part, (d, a) in self._read(dtype, extra):
            yield self.weights[part, None, None].to(dtype), d, a

    def left_step(self, right: Tensor | None, sign: int = 1) -> Tensor:
        out, dtype = self._sum(self.shape[0], right)
        half = None if right is None else half_of(right)
        for w, d, a in self._chunks(dtype):
            products = (w * _products(a[:, None], half, sign))[:, None]
            image = products * d if d.shape[2] == 1 else products @ d
            add_upper(out, d.flatten(0, 2), image.flatten(0, 2))
        return mirror(out, sign)

    def right_step(self, left: Tensor | None, sign: int = 1) -> Tensor:
        out, dtype = self._sum(self.shape[1], left)
        half = None if left is None else half_of(left)
        for w, d, a in self._chunks(dtype):
            products = w * _products(d, half, sign)
            image = products * a if a.shape[1] == 1 else products @ a
            add_upper(out, a.flatten(0, 1), image.flatten(0, 1))
        return mirror(out, sign)

    def _sum(self, size: int, given: Tensor | None) -> tuple[Tensor, torch.dtype]:
        out = torch.zeros(size, size, dtype=torch.float64, device=self.weights.device)
        return out, torch.float64 if given is None else given.dtype

    def quadratic_forms(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        on_left = None if left is None else half_of(left)
        on_right = None if right is None else half_of(right)
        return torch.cat(
            [
                (_products(a[:, None], on_right) * _products(d, on_left)).sum(dim=(1, 2))
                for _, d, a in self._chunks()
            ]
        )

    def many_forms(self, lefts: Tensor, rights: Tensor) -> Tensor:
        """sum_c <G_ic, A_b G_ic C_e> of each example and pair of matrices, float64 [N, B, E].

        Args:
            lefts: A, symmetric [B, m, m]; the products run in its dtype, float64 or float32.
            rights: C, symmetric [E, n, n], of the same dtype.
        """
        on_left = [half_of(matrix) for matrix in lefts]
        on_right = [half_of(matrix) for matrix in rights]
        t = self.samples.n_positions
        parts = []
        for _, d, a in self._chunks(lefts.dtype, (len(lefts) + len(rights)) * t * t):
            outputs = torch.stack([_products(d, half).flatten(1) for half in on_left], dim=1)
            inputs = torch.stack([_products(a[:, None], h).flatten(1) for h in on_right], dim=1)
            parts.append((outputs @ inputs.mT).double())
        return torch.cat(parts)

    def projected_diagonal(self, left_basis: Tensor | None, right_basis: Tensor | None) -> Tensor:
        total: Tensor | None = None
        for w, d, a in self._chunks():
            d = d if left_basis is None else d @ left_basis
            a = a if right_basis is None else a @ right_basis
            if self._by_position_pairs():
                part = _paired_diagonal(w, d, a)
                total = part if total is None else total.add_(part)
            else:
                total = _formed_diagonal(total, w[:, 0, 0], d, a)
        assert total is not None
        return total

    def _by_position_pairs(self) -> bool:
        """Whether T (T + 1) / 2 products of positions cost less than C matrices per example."""
        pairs, formed = self._diagonal_work()
        return pairs.flops + 4 * pairs.stream <= formed.flops + 4 * formed.stream

    def _diagonal_work(self) -> tuple[Work, Work]:
        """From products of positions, and through G; a byte moved is worth four operations."""
        (m, n), s = self.shape, self.samples
        c, t = s.n_columns, s.n_positions
        pairs = t * (t + 1) // 2
        elements = s.n_examples * pairs * (c * m + n)
        paired = Work(2.0 * s.n_examples * pairs * m * n, stream=8.0 * 3 * elements)
        formed = product(m, t, n, s.n_examples * c) + Work(
            stream=8.0 * 3 * s.n_examples * c * m * n
        )
        return paired, formed

    def _coefficients(self, parts: Parts, x: Tensor) -> Tensor:
        d, a = parts
        out = x.new_empty(len(x), *d.shape[:2])
        for one, image in zip(x, out, strict=True):
            torch.sum((a @ one.T)[:, None] * d, dim=(2, 3), out=image)
        return out

    def _combine(self, parts: Parts, c: Tensor, out: Tensor) -> None:
        d, a = parts
        for one, image in zip(c, out, strict=True):
            combined = (one[:, :, None, None] * d).sum(dim=1)
            image.addmm_(combined.flatten(0, 1).T, a.flatten(0, 1))

    def elementwise_forms(
        self, values: Tensor, left_basis: Tensor | None, right_basis: Tensor | None
    ) -> Tensor:
        if self.samples.n_positions > 1:
            return super().elementwise_forms(values, left_basis, right_basis)
        d, a = self._squares(left_basis, right_basis)
        return ((d @ values) * a).sum(dim=1)

    def energies(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        if self.samples.n_positions > 1:
            return super().energies(left_basis, right_basis)
        d, a = self._squares(left_basis, right_basis)
        return torch.cat([d * a.sum(dim=1, keepdim=True), a * d.sum(dim=1, keepdim=True)], dim=1)

    def diagonal_pairs(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        if self.samples.n_positions > 1:
            return super().diagonal_pairs(weights)
        d, a = self._squares(None, None)
        mean = (d * weights[:, None]).T @ a
        return ((d @ mean) * a).sum(dim=1), d.square().sum(dim=1) * a.square().sum(dim=1)

    def _squares(self, left: Tensor | None, right: Tensor | None) -> tuple[Tensor, Tensor]:
        """sum_c (Q_L^T d_ic)^{o2} [N, r] and (Q_R^T a_i)^{o2} [N, s] of unshared samples."""
        d, a = self.samples.output_grads[:, :, 0], self.samples.inputs[:, 0].double()
        a = (a if right is None else a @ right).square()
        out: list[Tensor] = []
        for part in self._ranges(chunk_rows(d.shape[1] * d.shape[2])):
            rows = d[part].double()
            out.append((rows if left is None else rows @ left).square().sum(dim=1))
        return torch.cat(out), a

    def factor_energies(self) -> list[Tensor]:
        return [
            torch.cat(
                [
                    rows[part].double().square().flatten(1).sum(dim=1)
                    for part in self._ranges(chunk_rows(rows[0].numel()))
                ]
            )
            for rows in (self.samples.output_grads, self.samples.inputs)
        ]

    def rearranged(self) -> Tensor:
        """sum_i w_i vec(S_i) vec(a_i a_i^T)^T, C times fewer products than through H."""
        if self.samples.n_positions > 1:
            return super().rearranged()
        m, n = self.shape
        out = torch.zeros(m * m, n * n, dtype=torch.float64, device=self.weights.device)
        for part in self._ranges(chunk_rows(m * m + n * n)):
            d = self.samples.output_grads[part, :, 0].double()
            a = self.samples.inputs[part, 0].double()
            left = (d.mT @ d * self.weights[part, None, None]).flatten(1)
            out.addmm_(left.T, (a[:, :, None] * a[:, None]).flatten(1))
        return out

    def pair_steps(self) -> tuple[int, int]:
        (m, n), s = self.shape, self.samples
        rows = s.n_columns * s.n_positions
        side = max(1, int(chunk_rows(2) ** 0.5) // rows)
        step = max(1, min(side, chunk_rows(rows * (m + n))))
        return step, step

    def _pair_parts(
        self, rows: slice, other: FactorKernels, columns: slice
    ) -> tuple[Tensor, Tensor]:
        """<d, d'> [I, C, T, J, C', T'] and <a, a'> [I, 1, T, J, 1, T'] of two ranges."""
        one, two = self.samples, other.samples
        m, n = self.shape
        d1, a1 = one.output_grads[rows].double(), one.inputs[rows].double()
        d2, a2 = two.output_grads[columns].double(), two.inputs[columns].double()
        (i, c, t, _), (j, e, s, _) = d1.shape, d2.shape
        outputs = (d1.reshape(-1, m) @ d2.reshape(-1, m).T).view(i, c, t, j, e, s)
        return outputs, (a1.reshape(-1, n) @ a2.reshape(-1, n).T).view(i, 1, t, j, 1, s)

    def products(self, rows: slice, other: Kernels, columns: slice) -> Tensor:
        if not isinstance(other, FactorKernels):
            return super().products(rows, other, columns)
        outputs, inputs = self._pair_parts(rows, other, columns)
        return (outputs * inputs).sum(dim=5).sum(dim=2)

    def pair_block(self, rows: slice, other: Kernels, columns: slice) -> Tensor:
        unshared = self.samples.n_positions == other.samples.n_positions == 1
        if not unshared or not isinstance(other, FactorKernels):
            return super().pair_block(rows, other, columns)
        outputs, inputs = self._pair_parts(rows, other, columns)
        folded = outputs.square_().sum(dim=(1, 2, 4, 5))
        return folded.mul_(inputs[:, 0, 0, :, 0, 0].square())

    def costs(self) -> Costs:
        (m, n), s = self.shape, self.samples
        count, c, t = float(s.n_examples), s.n_columns, s.n_positions
        chunks = count / chunk_rows(CACHED * self._per_example)
        # the factors and their images, read and written a few times
        moved = 8 * 4 * count * (c * t * m + t * n)
        passes = Work(stream=moved, calls=30 * (chunks + 1))
        shared = Work(stream=8 * 4 * count * t * t) if t > 1 else Work()
        # a product with one row per example is an element-wise pass
        inputs = product(t, n, t, count) if t > 1 else Work(stream=8 * 2 * count * n)
        outputs = product(t, c * m, t, count) if t > 1 else Work(stream=8 * 2 * count * c * m)
        on_n = product(count * t, n, n) * panel_share(n)
        on_m = product(count * c * t, m, m) * panel_share(m)
        step = on_n + on_m + inputs + outputs + shared + passes
        paired, formed = self._diagonal_work()
        rotated = product(count * t, n, n) + product(count * c * t, m, m) + passes
        rows = count * c * t
        products = Work(flops=rows**2 * m + (count * t) ** 2 * n)
        folding = 8.0 * ((rows**2 * 5 + (count * t) ** 2 * 2) / 2)
        side, _ = self.pair_steps()
        blocks = (count / side + 1) ** 2 / 2
        # each block converts its own factors
        converted = 12.0 * blocks * 2 * min(side, count) * (c * t * m + t * n)
        return Costs(
            left=step,
            right=step,
            forms=step,
            diagonal=(paired if self._by_position_pairs() else formed) + rotated,
            pairs=products + Work(stream=folding + converted, calls=12 * blocks),
            apply=Work(flops=2 * 2 * count * t * m * n / 1, stream=moved, calls=10 * chunks),
            nbytes=8.0 * 4 * (m * m + n * n) + 1e8,
        )


def _products(x: Tensor, half: Tensor | None, sign: int = 1) -> Tensor:
    """sum_c x_c V x_c^T of ``x`` [k, C, T, s], V = S + sign S^T or the identity: [k, T, T]."""
    image = x if half is None else times_half(x, half)
    if x.shape[2] == 1:
        diagonal = (image * x).sum(dim=(1, 3))[:, :, None]
        return diagonal if half is None else (1 + sign) * diagonal
    if x.shape[1] == 1:
        products = image[:, 0] @ x[:, 0].mT
    else:
        flat = (x.shape[0], x.shape[2], -1)
        products = image.transpose(1, 2).reshape(flat) @ x.transpose(1, 2).reshape(flat).mT
    return products if half is None else products + sign * products.mT


def _paired_diagonal(weights: Tensor, d: Tensor, a: Tensor) -> Tensor:
    """sum_i w_i sum_c (sum_t d_t a_t^T)^{o2}, as a sum over pairs of positions, [r, s]."""
    t = a.shape[1]
    if t == 1:
        left = weights[:, 0] * d[:, :, 0].square().sum(dim=1)
        return left.T @ a[:, 0].square()
    first, second = torch.triu_indices(t, t, device=d.device)
    doubled = torch.where(first == second, 1.0, 2.0).to(d.dtype)
    total = torch.zeros(d.shape[3], a.shape[2], dtype=d.dtype, device=d.device)
    step = chunk_rows(len(first) * (2 * d.shape[1] * d.shape[3] + 2 * a.shape[2]))
    for i in range(0, d.shape[0], step):
        x, y = d[i : i + step], a[i : i + step]
        left = (x[:, :, first] * x[:, :, second]).sum(dim=1)
        right = y[:, first] * y[:, second] * (weights[i : i + step] * doubled[:, None])
        total.addmm_(left.flatten(0, 1).T, right.flatten(0, 1))
    return total


def _formed_diagonal(total: Tensor | None, weights: Tensor, d: Tensor, a: Tensor) -> Tensor:
    """``total`` + sum_i w_i sum_c G^{o2} with G = d^T a formed a few examples at a time."""
    step = chunk_rows(CACHED * d.shape[1] * d.shape[3] * a.shape[2])
    for i in range(0, d.shape[0], step):
        g = d[i : i + step].mT @ a[i : i + step, None]
        total = sum_of_squares(total, g, weights[i : i + step])
    assert total is not None
    return total
