"""Products with the draws of each kind of samples, without forming gradient matrices twice."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any, Generic, TypeVar, final

from torch import Tensor

from kronecker_probe.gradients.samples.base import (
    EmbeddingSamples,
    FactoredSamples,
    GradientSamples,
)
from kronecker_probe.linalg.gram import CHUNK_ELEMENTS, chunk_rows

S = TypeVar("S", bound=GradientSamples)
Parts = tuple[Tensor, ...]


class DrawReader(abc.ABC, Generic[S]):
    """Linear maps between the m x n matrices and the draws, without the data's weights.

    Args:
        samples: The draws.
    """

    def __init__(self, samples: S) -> None:
        self.samples = samples

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Numbers held for one datum while its products are computed."""

    @property
    @abc.abstractmethod
    def pairs(self) -> int:
        """Rows of one datum in a matrix of pair products, before positions are summed."""

    @abc.abstractmethod
    def read(self, part: slice) -> Parts:
        """The data of a range, float64."""

    @abc.abstractmethod
    def coefficients(self, parts: Parts, x: Tensor) -> Tensor:
        """<G_ic, x> of one ``x`` [m, n], [k, C]."""

    @abc.abstractmethod
    def add(self, parts: Parts, c: Tensor, out: Tensor) -> None:
        """Add sum_ic c_ic G_ic of coefficients [k, C] to ``out`` [m, n]."""

    @abc.abstractmethod
    def products(self, one: Parts, other: Parts) -> Tensor:
        """<G_ic, G_jd> of two ranges, as a matrix [I C, J C]."""

    def chunks(self) -> Iterator[tuple[slice, Parts]]:
        """The data in ranges that fit one chunk."""
        for part in self.ranges(chunk_rows(self.width)):
            yield part, self.read(part)

    def blocks(self) -> list[slice]:
        """Ranges whose pair products fit one chunk."""
        side = int(CHUNK_ELEMENTS**0.5) // self.pairs
        return list(self.ranges(max(1, min(side, chunk_rows(self.width)))))

    def ranges(self, step: int) -> Iterator[slice]:
        """Consecutive ranges of the data."""
        count = self.samples.n_examples
        return (slice(i, min(i + step, count)) for i in range(0, count, step))


@final
class FactorReader(DrawReader[FactoredSamples]):
    """From d [k, C, T, m] and a [k, T, n]."""

    @property
    def width(self) -> int:
        m, n = self.samples.shape
        return self.samples.n_positions * (self.samples.n_columns * m + n)

    @property
    def pairs(self) -> int:
        return self.samples.n_columns * self.samples.n_positions

    def read(self, part: slice) -> Parts:
        return self.samples.output_grads[part].double(), self.samples.inputs[part].double()

    def coefficients(self, parts: Parts, x: Tensor) -> Tensor:
        d, a = parts
        return ((a @ x.T)[:, None] * d).sum(dim=(2, 3))

    def add(self, parts: Parts, c: Tensor, out: Tensor) -> None:
        d, a = parts
        combined = (c[:, :, None, None] * d).sum(dim=1)
        out.addmm_(combined.flatten(0, 1).T, a.flatten(0, 1))

    def products(self, one: Parts, other: Parts) -> Tensor:
        (d, a), (e, b) = one, other
        return _summed(d, e, a.flatten(0, 1) @ b.flatten(0, 1).T)


@final
class EmbeddingReader(DrawReader[EmbeddingSamples]):
    """From tokens [k, T] and d [k, C, T, D]: one-hot inputs are never formed."""

    @property
    def width(self) -> int:
        return self.samples.n_slots * (self.samples.n_columns + 1) * self.samples.shape[1]

    @property
    def pairs(self) -> int:
        return self.samples.n_columns * self.samples.n_slots

    def read(self, part: slice) -> Parts:
        return self.samples.output_grads[part].double(), self.samples.tokens[part]

    def coefficients(self, parts: Parts, x: Tensor) -> Tensor:
        d, tokens = parts
        return (x[tokens][:, None] * d).sum(dim=(2, 3))

    def add(self, parts: Parts, c: Tensor, out: Tensor) -> None:
        d, tokens = parts
        combined = (c[:, :, None, None] * d).sum(dim=1)
        out.index_add_(0, tokens.flatten(), combined.flatten(0, 1))

    def products(self, one: Parts, other: Parts) -> Tensor:
        (d, tokens), (e, others) = one, other
        return _summed(d, e, (tokens.reshape(-1, 1) == others.flatten()).double())


@final
class MatrixReader(DrawReader[GradientSamples]):
    """From G [k, C, m, n]; any samples have it."""

    @property
    def width(self) -> int:
        m, n = self.samples.shape
        return self.samples.n_columns * m * n

    @property
    def pairs(self) -> int:
        return self.samples.n_columns

    def read(self, part: slice) -> Parts:
        return (self.samples.matrices(part.start, part.stop),)

    def coefficients(self, parts: Parts, x: Tensor) -> Tensor:
        (g,) = parts
        return g.flatten(2) @ x.flatten()

    def add(self, parts: Parts, c: Tensor, out: Tensor) -> None:
        (g,) = parts
        out += (c.flatten() @ g.flatten(0, 1).flatten(1)).view(out.shape)

    def products(self, one: Parts, other: Parts) -> Tensor:
        (g,), (h,) = one, other
        return g.flatten(0, 1).flatten(1) @ h.flatten(0, 1).flatten(1).T


def _summed(d: Tensor, e: Tensor, inputs: Tensor) -> Tensor:
    """sum_ts <d_ict, e_jfs> <a_it, b_js> from the input products [I T, J S]."""
    (i, c, t, _), (j, f, s, _) = d.shape, e.shape
    outputs = d.flatten(0, 2) @ e.flatten(0, 2).T
    outputs = outputs.view(i, c, t, j, f, s) * inputs.view(i, 1, t, j, 1, s)
    return outputs.sum(dim=(2, 5)).view(i * c, j * f)


def reader_for(samples: GradientSamples) -> DrawReader[Any]:
    """The cheapest reader for single products."""
    if isinstance(samples, FactoredSamples):
        return FactorReader(samples)
    if isinstance(samples, EmbeddingSamples):
        return EmbeddingReader(samples)
    return MatrixReader(samples)


def pair_reader_for(samples: GradientSamples) -> DrawReader[Any]:
    """The cheapest reader for products of pairs: from G where T^2 (m + n) exceeds m n."""
    m, n = samples.shape
    positions = samples.n_positions or 1
    if positions > 1 and positions**2 * (m + n) > m * n:
        return MatrixReader(samples)
    return reader_for(samples)
