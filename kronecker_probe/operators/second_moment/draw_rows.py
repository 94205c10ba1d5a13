"""The draws of a second moment as rows: H = X^T X, so that its rank is at most N C."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias, final

import torch
from torch import Tensor

from kronecker_probe.gradients.samples.base import GradientSamples
from kronecker_probe.operators.second_moment.kernels.draw_readers import (
    MatrixReader,
    pair_reader_for,
    reader_for,
)

Transform: TypeAlias = Callable[[Tensor], Tensor]


@final
class DrawSpace:
    """X [K, mn] with the K = N C rows sqrt(w_i) vec(G_ic), never held as a whole.

    Args:
        samples: The draws.
    """

    def __init__(self, samples: GradientSamples) -> None:
        self.samples = samples
        self.shape = samples.shape
        self.roots = samples.weights.sqrt()
        self._reader = reader_for(samples)

    @property
    def count(self) -> int:
        """K."""
        return self.samples.n_examples * self.samples.n_columns

    def coefficients(self, x: Tensor) -> Tensor:
        """X vec(x) of float64 ``x`` [b, m, n], as [b, K]."""
        out = x.new_empty(len(x), self.samples.n_examples, self.samples.n_columns)
        for part, data in self._reader.chunks():
            for k, one in enumerate(x):
                out[k, part] = self._reader.coefficients(data, one)
        return (out * self.roots[None, :, None]).flatten(1)

    def combine(self, coefficients: Tensor) -> Tensor:
        """X^T c of float64 ``coefficients`` [b, K], as [b, m, n]."""
        b, columns = len(coefficients), self.samples.n_columns
        weighted = coefficients.view(b, -1, columns) * self.roots[None, :, None]
        out = coefficients.new_zeros(b, *self.shape)
        for part, data in self._reader.chunks():
            for k, image in enumerate(out):
                self._reader.add(data, weighted[k, part], image)
        return out

    def gram(self) -> Tensor:
        """X X^T, float64 [K, K]; its nonzero eigenvalues are those of H."""
        reader, columns = pair_reader_for(self.samples), self.samples.n_columns
        out = self.roots.new_empty(self.count, self.count)
        blocks = reader.blocks()
        for k, one in enumerate(blocks):
            left = reader.read(one)
            for other in blocks[k:]:
                right = left if other is one else reader.read(other)
                products = reader.products(left, right)
                rows, across = (slice(b.start * columns, b.stop * columns) for b in (one, other))
                out[rows, across] = products
                if other is not one:
                    out[across, rows] = products.T
        roots = self.roots.repeat_interleave(columns)
        return out.mul_(roots[:, None]).mul_(roots)

    def transformed(self, transform: Transform) -> Tensor:
        """The rows after a linear map of matrices [k, m, n], float64 [K, mn]; held as a whole."""
        m, n = self.shape
        out = self.roots.new_empty(self.samples.n_examples, self.samples.n_columns, m * n)
        for part, (g,) in MatrixReader(self.samples).chunks():
            image = transform(g.flatten(0, 1)).view(*g.shape[:2], m * n)
            out[part] = image * self.roots[part, None, None]
        return out.flatten(0, 1)

    def gradients(self, count: int, seed: int) -> Iterator[Tensor]:
        """Some gradients sum_c s_c G_ic with random signs s_c, of data drawn by weight, [m, n].

        For equal weights E[g g^T] = H / sum(w). Data are drawn without replacement, so there are
        at most as many as data of positive weight.
        """
        generator = torch.Generator().manual_seed(seed)
        weights = self.samples.weights.cpu()
        k = min(count, int((weights > 0).sum()))
        if k == 0:
            return
        chosen = torch.multinomial(weights, k, replacement=False, generator=generator)
        signs = torch.randint(0, 2, (k, self.samples.n_columns), generator=generator)
        for i, sign in zip(chosen.tolist(), (2.0 * signs - 1.0).double(), strict=True):
            columns = self.samples.matrices(i, i + 1)[0]
            yield torch.einsum("c,cmn->mn", sign.to(columns.device), columns)
