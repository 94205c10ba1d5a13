"""Weighted gradient samples of a layer, m x n, kept as factors, as tokens or as matrices."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor

from kronecker_probe.gradients.samples import checks
from kronecker_probe.linalg.memory import require_memory
from kronecker_probe.linalg.rearrangement import one_hot_products


class GradientSamples(abc.ABC):
    """N weighted samples of an m x n gradient matrix, C columns each.

    Their second moment is H = sum_i w_i sum_c vec(G_ic) vec(G_ic)^T. The gradient for one sampled
    label, or of one mini-batch, has C = 1; the exact Gauss-Newton has one column per class. Build
    them with :meth:`from_factors`, :meth:`from_matrices` or ``kp.capture``.

    Attributes:
        weights: float64 [N], used as given, never renormalized.
        independent: Whether the examples are independent samples from one distribution, which error
            bars need. False for the closed form of ``kp.batch_gradients`` and for gradients along
            a run: there the weighted sum is the target itself, without sampling error.
        dropped_energy: Share of Tr H that truncation to a low rank left out of these samples. A
            subset keeps it, and a stack keeps the largest.
    """

    weights: Tensor
    independent: bool
    dropped_energy: float
    # attributes that hold the gradients, tensors with N in front: name, dimensions of C and of T
    _held: ClassVar[tuple[tuple[str, int | None, int | None], ...]]

    @staticmethod
    def from_factors(
        output_grads: Tensor, inputs: Tensor, weights: Tensor | Sequence[float] | None = None
    ) -> FactoredSamples:
        """Samples G_i = sum_t d_it a_it^T of a linear layer, kept as factors.

        Args:
            output_grads: d, [N, m], or [N, T, m] with T shared positions, or [N, C, T, m] with
                C columns that share the inputs of their example.
            inputs: a, [N, n] or [N, T, n].
            weights: [N], nonnegative, used as given; None means 1/N each.

        Returns:
            Samples that hold these tensors, without a copy.

        Raises:
            InvalidInputError: The shapes do not fit, or a dtype is not floating point.
            NonFiniteError: A NaN or an infinity in a tensor or weight.
        """
        return FactoredSamples(*checks.check_factors(output_grads, inputs, weights))

    @staticmethod
    def from_matrices(
        matrices: Tensor, weights: Tensor | Sequence[float] | None = None
    ) -> MatrixSamples:
        """Samples that hold these matrices, without a copy.

        Args:
            matrices: G, [N, m, n], or [N, C, m, n] with C columns per example.
            weights: [N], nonnegative, used as given; None means 1/N each.

        Raises:
            InvalidInputError: The shape does not fit, or the dtype is not floating point.
            NonFiniteError: A NaN or an infinity in a tensor or weight.
        """
        return MatrixSamples(*checks.check_matrices(matrices, weights))

    @staticmethod
    def from_embedding(
        tokens: Tensor,
        output_grads: Tensor,
        vocabulary: int,
        weights: Tensor | Sequence[float] | None = None,
    ) -> EmbeddingSamples:
        """Samples G_i = sum_t e_k(i,t) d_it^T of a table look-up, V x D; e is never formed.

        Args:
            tokens: k, [N, T], indices below ``vocabulary``.
            output_grads: d, [N, T, D], or [N, C, T, D] with C columns per example.
            vocabulary: V, the rows of the table.
            weights: [N], nonnegative, used as given; None means 1/N each.

        Raises:
            InvalidInputError: Shapes that do not fit, a wrong dtype, or a token out of range.
            NonFiniteError: A NaN or an infinity in a tensor or weight.
        """
        k, d, checked = checks.check_embedding(tokens, output_grads, vocabulary, weights)
        return EmbeddingSamples(k, d, vocabulary, checked)

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs and inputs."""

    @property
    def n_columns(self) -> int:
        """C, the gradient columns of one example."""
        found = (getattr(self, name).shape[dim] for name, dim, _ in self._held if dim)
        return int(next(found))

    @property
    def n_positions(self) -> int | None:
        """T, the shared positions; None for samples without vectors d and a."""
        return None

    @property
    def n_slots(self) -> int | None:
        """T of the tensors, whatever a position holds; None for samples kept as matrices."""
        return self.n_positions

    @abc.abstractmethod
    def matrices(self, start: int = 0, stop: int | None = None) -> Tensor:
        """G of the examples ``start`` to ``stop`` as float64 [k, C, m, n]."""

    def block(self, rows: slice, columns: slice) -> Self:
        """The samples of a sub-matrix, G[rows, columns], with the same weights; views if possible.

        Args:
            rows: Of the m outputs, in steps of 1.
            columns: Of the n inputs, in steps of 1.

        Raises:
            InvalidInputError: An empty range, or another step.
        """
        m, n = self.shape
        return self._block(
            checks.check_range("rows", rows, m), checks.check_range("columns", columns, n)
        )

    @abc.abstractmethod
    def _block(self, rows: slice, columns: slice) -> Self: ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the gradients are held in, each with N in front; without the weights."""
        return tuple(getattr(self, name) for name, *_ in self._held)

    def with_tensors(self, tensors: Sequence[Tensor], weights: Tensor) -> Self:
        """The same kind of samples, held in other :attr:`tensors`."""
        held = {name: tensor for (name, *_), tensor in zip(self._held, tensors, strict=True)}
        return replace(self, **held, weights=weights)  # type: ignore[type-var]

    def padded(self, columns: int, positions: int | None) -> Self:
        """The same samples with zeros up to C = ``columns`` and T = ``positions``: H is unchanged.

        Only the scale of K-FAC's E[a a^T], a mean over positions, sees the added ones.
        """
        more = columns - self.n_columns, (positions or 0) - (self.n_slots or 0)
        tensors = []
        for name, *dims in self._held:
            tensor = getattr(self, name)
            for extra, dim in zip(more, dims, strict=True):
                if dim is not None and extra > 0:
                    tensor = F.pad(tensor, [0, 0] * (tensor.ndim - 1 - dim) + [0, extra])
            tensors.append(tensor)
        return self.with_tensors(tensors, self.weights)

    @staticmethod
    def stack(
        parts: Sequence[GradientSamples], scales: Sequence[float] | None = None
    ) -> GradientSamples:
        """All examples of several samples of one m x n matrix, one after the other.

        Parts of different C or T are padded with zeros; parts of different kinds become matrices.

        Args:
            parts: At least one.
            scales: Part k's weights are multiplied by scales[k], so that H = sum_k scales[k] H_k:
                n_k / N for examples loaded in batches, say. None keeps the weights.

        Raises:
            InvalidInputError: No parts, other shapes or devices, or not one scale >= 0 per part.
            MemoryBudgetError: The result would not fit.
        """
        checks.check_parts(parts, GradientSamples)
        factors = checks.check_scales(scales, len(parts))
        if len({type(part) for part in parts}) > 1:
            parts = [_as_matrices(part) for part in parts]
        columns = max(part.n_columns for part in parts)
        positions = max((part.n_slots or 0) for part in parts)
        alike = [part.padded(columns, positions or None) for part in parts]
        size = sum(part.nbytes for part in alike)
        require_memory(size, f"A stack of {len(parts)} sets of samples", parts[0].device)
        tensors = [
            torch.cat(found) for found in zip(*(part.tensors for part in alike), strict=True)
        ]
        weights = [part.weights * factor for part, factor in zip(alike, factors, strict=True)]
        stacked = alike[0].with_tensors(tensors, torch.cat(weights))
        stacked.independent = all(part.independent for part in parts)
        stacked.dropped_energy = max(part.dropped_energy for part in parts)
        return stacked

    def subset(self, index: slice | Tensor | Sequence[int]) -> Self:
        """The examples at ``index``, with their weights as they are."""
        return self.with_tensors([tensor[index] for tensor in self.tensors], self.weights[index])

    def to(self, device: torch.device | str) -> Self:
        """The same samples on another device."""
        return self.with_tensors([t.to(device) for t in self.tensors], self.weights.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes of the gradients."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def n_examples(self) -> int:
        """N."""
        return self.weights.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the samples live."""
        return self.weights.device

    def __len__(self) -> int:
        return self.n_examples

    def __repr__(self) -> str:
        m, n = self.shape
        parts = [f"{m} x {n}, N={self.n_examples}, C={self.n_columns}"]
        parts += [] if self.n_positions is None else [f"T={self.n_positions}"]
        size = f"{self.nbytes / 1e6:.1f} MB"
        parts.append(f"{size}, {self.dropped_energy:.2g} dropped" if self.dropped_energy else size)
        return f"{type(self).__name__}({', '.join(parts)})"


@final
@dataclass(eq=False, repr=False)
class FactoredSamples(GradientSamples):
    """G_ic = sum_t d_ict a_it^T, kept as (d, a).

    Attributes:
        output_grads: d, [N, C, T, m].
        inputs: a, [N, T, n].
    """

    output_grads: Tensor
    inputs: Tensor
    weights: Tensor
    independent: bool = True
    dropped_energy: float = 0.0
    _held = (("output_grads", 1, 2), ("inputs", None, 1))

    @property
    def shape(self) -> tuple[int, int]:
        return self.output_grads.shape[3], self.inputs.shape[2]

    @property
    def n_positions(self) -> int:
        return self.output_grads.shape[2]

    def matrices(self, start: int = 0, stop: int | None = None) -> Tensor:
        d = self.output_grads[start:stop].double()
        a = self.inputs[start:stop].double()
        return d.mT @ a[:, None]

    def _block(self, rows: slice, columns: slice) -> FactoredSamples:
        parts = self.output_grads[..., rows], self.inputs[..., columns]
        return self.with_tensors(parts, self.weights)


@final
@dataclass(eq=False, repr=False)
class MatrixSamples(GradientSamples):
    """G_ic kept as matrices.

    Attributes:
        values: G, [N, C, m, n].
    """

    values: Tensor
    weights: Tensor
    independent: bool = True
    dropped_energy: float = 0.0
    _held = (("values", 1, None),)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[2], self.values.shape[3]

    def matrices(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.values[start:stop].double()

    def _block(self, rows: slice, columns: slice) -> MatrixSamples:
        return self.with_tensors([self.values[..., rows, columns]], self.weights)


@final
@dataclass(eq=False, repr=False)
class EmbeddingSamples(GradientSamples):
    """G_ic = sum_t e_k(i,t) d_ict^T, V x D, kept as (k, d): the one-hot e is never formed.

    They have no ``n_positions``, because their inputs are the tokens and not vectors.

    Attributes:
        tokens: k, int64 [N, T].
        output_grads: d, [N, C, T, D].
        vocabulary: V.
    """

    tokens: Tensor
    output_grads: Tensor
    vocabulary: int
    weights: Tensor
    independent: bool = True
    dropped_energy: float = 0.0
    _held = (("tokens", None, 1), ("output_grads", 1, 2))

    @property
    def shape(self) -> tuple[int, int]:
        return self.vocabulary, self.output_grads.shape[3]

    @property
    def n_slots(self) -> int:
        return self.tokens.shape[1]

    def matrices(self, start: int = 0, stop: int | None = None) -> Tensor:
        d = self.output_grads[start:stop].double()
        g = one_hot_products(self.tokens[start:stop, None].expand(d.shape[:3]), d, self.vocabulary)
        return g.view(*d.shape[:2], self.vocabulary, d.shape[3])

    def _block(self, rows: slice, columns: slice) -> EmbeddingSamples:
        inside = (self.tokens >= rows.start) & (self.tokens < rows.stop)
        tokens = torch.where(inside, self.tokens - rows.start, 0)
        d = self.output_grads[..., columns] * inside[:, None, :, None]
        part = self.with_tensors((tokens, d), self.weights)
        return replace(part, vocabulary=rows.stop - rows.start)


def _as_matrices(samples: GradientSamples) -> MatrixSamples:
    if isinstance(samples, MatrixSamples):
        return samples
    m, n = samples.shape
    size = 8 * samples.n_examples * samples.n_columns * m * n
    require_memory(size, f"The matrices of {samples!r}", samples.device)
    return MatrixSamples(
        samples.matrices(), samples.weights, samples.independent, samples.dropped_energy
    )
