"""Sums over samples of a table look-up, from tokens and output gradients; no one-hot, no G."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from kronecker_probe.gradients.samples.base import EmbeddingSamples
from kronecker_probe.linalg.gram import chunk_rows
from kronecker_probe.operators.second_moment.cost_model import Costs, Work, product
from kronecker_probe.operators.second_moment.kernels.base import Kernels, Parts
from kronecker_probe.operators.second_moment.kernels.matrix import sum_of_squares


@final
class EmbeddingKernels(Kernels):
    """From G = sum_t e_k(t) d_t^T: products with one-hot vectors are look-ups and scatters.

    Tokens that repeat within an example are added up first, so that its rows are distinct.
    """

    samples: EmbeddingSamples

    def __init__(self, samples: EmbeddingSamples) -> None:
        super().__init__(samples)
        c, t, d = samples.output_grads.shape[1:]
        self._per_example = 4 * c * t * d + 3 * t * t
        # <G, G'> takes T^2 D operations from tokens and V D from matrices
        self._by_tokens = t * t <= samples.vocabulary

    def _read(self) -> Iterator[tuple[slice, Parts]]:
        """Tokens [k, T] and d [k, C, T, D]."""
        s = self.samples
        for part in self._ranges(chunk_rows(self._per_example)):
            yield part, (s.tokens[part], s.output_grads[part].double())

    def _chunks(self, dtype: torch.dtype = torch.float64) -> Iterator[Parts]:
        """(w [k], tokens [k, U], d [k, C, U, D]), of the U distinct tokens of each example."""
        s = self.samples
        for part in self._ranges(chunk_rows(self._per_example)):
            yield (
                self.weights[part].to(dtype),
                *_distinct(s.tokens[part], s.output_grads[part].to(dtype)),
            )

    def left_step(self, right: Tensor | None, sign: int = 1) -> Tensor:
        v = self.shape[0]
        out = torch.zeros(v * v, dtype=torch.float64, device=self.weights.device)
        for w, tokens, d in self._chunks(torch.float64 if right is None else right.dtype):
            products = _products(d if right is None else d @ right, d) * w[:, None, None]
            places = tokens[:, :, None] * v + tokens[:, None]
            out.index_add_(0, places.flatten(), products.flatten().double())
        square = out.view(v, v)
        return (square + sign * square.T) / 2

    def right_step(self, left: Tensor | None, sign: int = 1) -> Tensor:
        width = self.shape[1]
        out = torch.zeros(width, width, dtype=torch.float64, device=self.weights.device)
        for w, tokens, d in self._chunks(torch.float64 if left is None else left.dtype):
            image = d if left is None else _looked_up(left, tokens)[:, None] @ d
            image = image * w[:, None, None, None]
            out += (d.reshape(-1, width).T @ image.reshape(-1, width)).double()
        return (out + sign * out.T) / 2

    def quadratic_forms(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        parts = []
        for _, tokens, d in self._chunks():
            image = d if right is None else d @ right
            if left is None:
                parts.append((image * d).sum(dim=(1, 2, 3)))
            else:
                parts.append((_looked_up(left, tokens) * _products(d, image)).sum(dim=(1, 2)))
        return torch.cat(parts)

    def projected_diagonal(self, left_basis: Tensor | None, right_basis: Tensor | None) -> Tensor:
        width = self.shape[1] if right_basis is None else right_basis.shape[1]
        total: Tensor | None = None
        if left_basis is None:
            total = torch.zeros(
                self.shape[0], width, dtype=torch.float64, device=self.weights.device
            )
        for w, tokens, d in self._chunks():
            d = d if right_basis is None else d @ right_basis
            if left_basis is None:
                assert total is not None
                squares = d.square().sum(dim=1) * w[:, None, None]
                total.index_add_(0, tokens.flatten(), squares.flatten(0, 1))
                continue
            step = chunk_rows(2 * d.shape[1] * left_basis.shape[1] * width)
            for i in range(0, len(d), step):
                rows = left_basis[tokens[i : i + step]]
                g = rows.mT[:, None] @ d[i : i + step]
                total = sum_of_squares(total, g, w[i : i + step])
        assert total is not None
        return total

    def _coefficients(self, parts: Parts, x: Tensor) -> Tensor:
        tokens, d = parts
        out = x.new_empty(len(x), *d.shape[:2])
        for one, image in zip(x, out, strict=True):
            torch.sum(one[tokens][:, None] * d, dim=(2, 3), out=image)
        return out

    def _combine(self, parts: Parts, c: Tensor, out: Tensor) -> None:
        tokens, d = parts
        for one, image in zip(c, out, strict=True):
            combined = (one[:, :, None, None] * d).sum(dim=1)
            image.index_add_(0, tokens.flatten(), combined.flatten(0, 1))

    def pair_steps(self) -> tuple[int, int]:
        c, t, d = self.samples.output_grads.shape[1:]
        if not self._by_tokens:
            step = chunk_rows(c * self.shape[0] * d)
            return step, step
        step = max(1, min(int(chunk_rows(2) ** 0.5) // (c * t), chunk_rows(c * t * d)))
        return step, step

    def products(self, rows: slice, other: Kernels, columns: slice) -> Tensor:
        if not (isinstance(other, EmbeddingKernels) and self._by_tokens and other._by_tokens):
            return super().products(rows, other, columns)
        one, two = self.samples, other.samples
        width = self.shape[1]
        d1, d2 = one.output_grads[rows].double(), two.output_grads[columns].double()
        (i, c, t, _), (j, e, s, _) = d1.shape, d2.shape
        same = one.tokens[rows].view(i, 1, t, 1, 1, 1) == two.tokens[columns].view(1, 1, 1, j, 1, s)
        products = (d1.reshape(-1, width) @ d2.reshape(-1, width).T).view(i, c, t, j, e, s)
        return (products * same).sum(dim=5).sum(dim=2)

    def costs(self) -> Costs:
        (v, width), s = self.shape, self.samples
        count, (c, t) = float(s.n_examples), s.output_grads.shape[1:3]
        chunks = count / chunk_rows(self._per_example)
        passes = Work(stream=8 * 8 * count * c * t * width, calls=30 * (chunks + 1))
        looked_up = Work(stream=8 * 6 * count * t * t)
        positions = product(t, c * width, t, count)
        onto = product(count * c * t, width, width)
        step = onto + positions + looked_up + passes
        inner = t * t if self._by_tokens else v
        pairs = Work(flops=(count * c) ** 2 * inner * width, stream=8 * 3 * (count * c) ** 2)
        return Costs(
            left=step + Work(stream=8.0 * v * v),
            right=step,
            forms=step,
            diagonal=product(v, t, width, count * c) + onto + passes,
            pairs=pairs + passes,
            apply=passes,
            nbytes=8.0 * 4 * (v * v + width * width) + 1e8,
        )


def _distinct(tokens: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Each example's distinct tokens [k, U], and the sums of their rows [k, C, U, D].

    Examples with fewer are filled up with zero rows of token 0.
    """
    ordered, order = tokens.sort(dim=1)
    steps = torch.zeros_like(ordered)
    steps[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = steps.cumsum(dim=1)
    counts = place[:, -1] + 1
    if int(counts.min()) == tokens.shape[1]:
        return tokens, d
    count = int(counts.max())
    found = tokens.new_zeros(len(tokens), count).scatter_(1, place, ordered)
    k, c, _, width = d.shape
    rows = d.gather(2, order[:, None, :, None].expand_as(d))
    summed = d.new_zeros(k, c, count, width)
    return found, summed.scatter_add_(2, place[:, None, :, None].expand_as(d), rows)


def _looked_up(matrix: Tensor, tokens: Tensor) -> Tensor:
    """U_{k(t) k(s)}, [k, U, U]."""
    return matrix[tokens[:, :, None], tokens[:, None]]


def _products(x: Tensor, y: Tensor) -> Tensor:
    """sum_c x_c y_c^T of [k, C, U, D], [k, U, U]."""
    flat = (x.shape[0], x.shape[2], -1)
    return x.transpose(1, 2).reshape(flat) @ y.transpose(1, 2).reshape(flat).mT
