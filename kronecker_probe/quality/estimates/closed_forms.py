"""U-statistics of the approximations with closed forms, unshared layers, by row sums of Grams.

In sample space H_i = S_i kron A_i, S_i = sum_c d_ic d_ic^T and A_i = a_i a_i^T, with inner products
Kd_ij = <S_i, S_j> and Ka_ij = <A_i, A_j>. A product of two sample means, L = E[x S] and
R = E[y A], has

    <H, L kron R> = E[Kd_ij x_j Ka_ik y_k],   |L|^2 = E[x_i x_j Kd_ij],   |R|^2 = E[y_i y_j Ka_ij]

over *distinct* indices, which removes all that an example has to do with itself. What an example
adds in each of its roles are row sums, so that all leave-one-out values cost a few N x N products
with vectors (Hoeffding, 1948; the jackknife of U-statistics: Arvesen, 1969).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from kronecker_probe.operators.factors.vectors import Rows
from kronecker_probe.operators.second_moment.kernels.vectors import unshared
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.quality.estimates.examples import Examples, pair_statistic
from kronecker_probe.quality.estimates.replicates import Replicates, leave_one_out


@dataclass(frozen=True)
class ProductForm:
    """P = L kron R or L kron R / Tr, L = E[x S] and R = E[y A].

    Attributes:
        outputs_by_norm: Whether x_j = |a_j|^2, else 1.
        inputs_by_norm: Whether y_k = |d_k|^2, else 1.
        by_trace: Whether P is divided by Tr H.
    """

    outputs_by_norm: bool
    inputs_by_norm: bool
    by_trace: bool


_SHAMPOO = ProductForm(True, True, True)
_KFAC = ProductForm(False, False, False)
# Without shared positions these are pairwise the same.
PRODUCTS = {
    "shampoo-squared": _SHAMPOO, "tkfac": _SHAMPOO, "kfac": _KFAC, "kfac-reduce": _KFAC,
}  # fmt: skip
ONE_SIDED = {"left-only": 0, "right-only": 1}


@final
class Grams:
    """Kd, Ka and what they give for one target (or one block of it) of unshared examples.

    Args:
        examples: The examples of the target that the numbers are for.
        outputs: d, [N, C, m], of that target or of a block of it.
        inputs: a, [N, 1, n].
    """

    def __init__(self, examples: Examples, outputs: Rows, inputs: Rows) -> None:
        self._examples = examples
        self.shape = outputs.size, inputs.size
        self._outputs = outputs
        self._inputs = inputs

    @staticmethod
    def of(examples: Examples, target: SecondMoment) -> Grams | None:
        """Those of ``target``, H itself or a block; None where its examples are no d a^T."""
        rows = target.sample_rows()
        if rows is None:
            samples = unshared(target.samples)
            if samples is None:
                return None
            rows = Rows(samples.output_grads[:, :, 0]), Rows(samples.inputs)
        return Grams(examples, *rows)

    @cached_property
    def sizes(self) -> tuple[Tensor, Tensor]:
        """|d_i|^2 = sum_c |d_ic|^2 and |a_i|^2, float64 [N]."""
        return self._outputs.squared_norms, self._inputs.squared_norms

    @cached_property
    def _pairs(self) -> Tensor:
        if self.shape == self._examples.target.shape:
            return self._examples.pairs
        return self._outputs.squared_gram * self._inputs.squared_gram

    def products(self, forms: list[ProductForm]) -> list[Replicates]:
        """Each product's replicates, all of them in one pass over the Grams."""
        d, a = self.sizes
        x = torch.stack([a if f.outputs_by_norm else torch.ones_like(a) for f in forms], dim=1)
        y = torch.stack([d if f.inputs_by_norm else torch.ones_like(d) for f in forms], dim=1)
        cross, lefts, rights = self._sums(x, y)
        trace = _mean(self._examples, d * a)
        target = self._examples.target_squares
        found = []
        for k, form in enumerate(forms):
            scale = trace if form.by_trace else torch.ones_like(trace)
            squares = lefts[:, k] * rights[:, k] / scale.square()
            found.append(Replicates(cross[:, k] / scale, target, squares, single=True))
        return found

    def _sums(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """<H, L kron R>, |L|^2 and |R|^2 over distinct examples, each [1 + N, k] of [N, k]."""
        p = self._examples.shares[:, None]
        kd, ka = self._outputs.squared_gram, self._inputs.squared_gram
        px, py = p * x, p * y
        on_left, on_right = _off_diagonal(kd, px), _off_diagonal(ka, py)
        pairs = _off_diagonal(self._pairs, self._examples.shares)[:, None]
        # the example as i, as j and as k of p_i p_j p_k Kd_ij x_j Ka_ik y_k
        first = p * (on_left * on_right - _off_diagonal(self._pairs, px * py))
        second = px * (_off_diagonal(kd, p * on_right) - py * pairs)
        third = py * (_off_diagonal(ka, p * on_left) - px * pairs)
        sums = leave_one_out(first.sum(dim=0), first + second + third)
        totals = self._examples.pair_totals
        return (
            sums / self._examples.triple_totals[:, None],
            pair_statistic(px * on_left, totals),
            pair_statistic(py * on_right, totals),
        )

    def one_sided(self, side: int) -> Replicates:
        """L kron I / n (side 0), or I / m kron R: <H, P> = |P|^2 = |L|^2 / n."""
        rows = (self._outputs, self._inputs)[side]
        weights = self._examples.shares * self.sizes[1 - side]
        form = weights * _off_diagonal(rows.squared_gram, weights)
        square = pair_statistic(form, self._examples.pair_totals) / self.shape[1 - side]
        return Replicates(square, self._examples.target_squares, square, single=True)


def identity(examples: Examples, sizes: Tensor, shape: tuple[int, int]) -> Replicates:
    """(Tr H / mn) I: <H, P> = |P|^2 = (Tr H)^2 / mn, of examples with sizes |G_i|^2."""
    parts = examples.shares * sizes
    rows = parts * (parts.sum() - parts)
    square = pair_statistic(rows, examples.pair_totals) / (shape[0] * shape[1])
    return Replicates(square, examples.target_squares, square, single=True)


def trace(examples: Examples) -> Tensor:
    """Tr H of all examples and without each, of the scale of H."""
    return examples.scale * _mean(examples, examples.sizes)


def norm(examples: Examples) -> Tensor:
    """|H| likewise."""
    return examples.scale * examples.target_squares.sqrt()


def _mean(examples: Examples, values: Tensor) -> Tensor:
    parts = examples.shares * values
    return leave_one_out(parts.sum(), parts) / examples.totals


def _off_diagonal(matrix: Tensor, vectors: Tensor) -> Tensor:
    """(K - diag K) v, of [N] or [N, k]."""
    diagonal = matrix.diagonal()
    return matrix @ vectors - (diagonal if vectors.ndim == 1 else diagonal[:, None]) * vectors
