"""Weighted draws of a layer's gradient matrix, factored or dense."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.gradients.samples.checks import (
    check_alike,
    check_range,
    check_scales,
    check_tensors,
    check_values,
    check_weights,
    dims,
)
from kronecker_probe.linalg.memory import require_memory

if TYPE_CHECKING:
    from kronecker_probe.gradients.samples.tokens import EmbeddingSamples


class GradientSamples(abc.ABC):
    """N weighted draws of an m x n gradient matrix, C columns each.

    A *datum* i contributes the C matrices G_ic with the same weight w_i, so that the second
    moment is H = sum_i w_i sum_c vec(G_ic) vec(G_ic)^T. One label draw or one mini-batch
    gradient has C = 1; the exact Gauss-Newton has one column a class.

    Build one with :meth:`from_factors` or :meth:`from_matrices`, or by ``kp.capture``.

    Attributes:
        weights: float64 [N], used as given, never renormalized.
        independent: Whether the data are independent draws of one distribution, which error bars
            need. False for the closed form of ``kp.batch_gradients`` and for gradients along a
            run: there the weighted sum is the target itself, without sampling error.
        dropped_energy: Share of Tr H that truncation left out of these draws, as that of a
            window of gradients at low rank; parts of them, and stacks, keep the largest.
    """

    weights: Tensor
    independent: bool
    dropped_energy: float = 0.0

    @staticmethod
    def from_factors(
        output_grads: Tensor, inputs: Tensor, weights: Tensor | Sequence[float] | None = None
    ) -> FactoredSamples:
        """Draws G_i = sum_t d_it a_it^T of a linear layer, kept as factors.

        Args:
            output_grads: d, [N, m], or [N, T, m] with T shared positions, or [N, C, T, m] with
                C columns that share a datum's inputs.
            inputs: a, [N, n] or [N, T, n].
            weights: [N], nonnegative, used as given; None means 1/N each.

        Returns:
            The samples; the tensors are kept as they are, without a copy.

        Raises:
            InvalidInputError: The shapes do not fit, or a dtype is not floating point.
            NonFiniteError: A NaN or an infinity in a tensor or weight.
        """
        check_tensors(output_grads=output_grads, inputs=inputs)
        forms = {(2, 2), (3, 3), (4, 3)}
        if (output_grads.ndim, inputs.ndim) not in forms:
            raise InvalidInputError(
                f"from_factors got output_grads {dims(output_grads)} and inputs {dims(inputs)}; "
                "give [N, m] with [N, n], [N, T, m] with [N, T, n], or [N, C, T, m] with [N, T, n]."
            )
        d = output_grads
        if d.ndim == 2:
            d, inputs = d[:, None], inputs[:, None]
        if d.ndim == 3:
            d = d[:, None]
        if d.shape[0] != inputs.shape[0] or d.shape[2] != inputs.shape[1]:
            raise InvalidInputError(
                f"from_factors got output_grads {dims(output_grads)} and inputs {dims(inputs)}: "
                "they must agree in N (data) and T (shared positions)."
            )
        check_values("output_grads", d)
        check_values("inputs", inputs)
        if d.device != inputs.device:
            raise InvalidInputError(
                f"output_grads are on {d.device} and inputs on {inputs.device}; move one."
            )
        checked = check_weights(weights, d.shape[0], d.device)
        return FactoredSamples(d.detach(), inputs.detach(), checked)

    @staticmethod
    def from_matrices(
        matrices: Tensor, weights: Tensor | Sequence[float] | None = None
    ) -> MatrixSamples:
        """Draws given as matrices.

        Args:
            matrices: G, [N, m, n], or [N, C, m, n] with C columns a datum.
            weights: [N], nonnegative, used as given; None means 1/N each.

        Returns:
            The samples; the tensor is kept as it is, without a copy.

        Raises:
            InvalidInputError: The shape does not fit, or the dtype is not floating point.
            NonFiniteError: A NaN or an infinity in a tensor or weight.
        """
        check_tensors(matrices=matrices)
        if matrices.ndim not in (3, 4):
            raise InvalidInputError(
                f"from_matrices got a tensor {dims(matrices)}; give [N, m, n] or [N, C, m, n]."
            )
        values = matrices if matrices.ndim == 4 else matrices[:, None]
        check_values("matrices", values)
        checked = check_weights(weights, values.shape[0], values.device)
        return MatrixSamples(values.detach(), checked)

    @staticmethod
    def from_embedding(
        tokens: Tensor,
        output_grads: Tensor,
        vocabulary: int,
        weights: Tensor | Sequence[float] | None = None,
    ) -> EmbeddingSamples:
        """Draws G_i = sum_t e_k(i,t) d_it^T of a table look-up, V x D; e is never formed.

        Args:
            tokens: k, [N, T], indices below ``vocabulary``.
            output_grads: d, [N, T, D], or [N, C, T, D] with C columns a datum.
            vocabulary: V, the rows of the table.
            weights: [N], nonnegative, used as given; None means 1/N each.

        Raises:
            InvalidInputError: Shapes that do not fit, a wrong dtype, or a token out of range.
            NonFiniteError: A NaN or an infinity in a tensor or weight.
        """
        from kronecker_probe.gradients.samples.tokens import embedding_samples

        return embedding_samples(tokens, output_grads, vocabulary, weights)

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs and inputs."""

    @property
    @abc.abstractmethod
    def n_columns(self) -> int:
        """C, the gradient columns of one datum."""

    @property
    @abc.abstractmethod
    def n_positions(self) -> int | None:
        """T, the shared positions; None for draws without factors."""

    @property
    def n_slots(self) -> int | None:
        """T of the tensors, whatever a position holds; None for draws kept as matrices."""
        return self.n_positions

    @abc.abstractmethod
    def matrices(self, start: int = 0, stop: int | None = None) -> Tensor:
        """G of data ``start`` to ``stop`` as float64 [k, C, m, n]."""

    @abc.abstractmethod
    def block(self, rows: slice, columns: slice) -> GradientSamples:
        """The draws of a sub-matrix, G[rows, columns], with the same weights; views where possible.

        Args:
            rows: Of the m outputs, in steps of 1.
            columns: Of the n inputs, in steps of 1.

        Raises:
            InvalidInputError: An empty range, or another step.
        """

    @property
    @abc.abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What the draws are held in, each with N in front; without the weights."""

    @abc.abstractmethod
    def with_tensors(self, tensors: Sequence[Tensor], weights: Tensor) -> Self:
        """The same kind of samples, held in other :attr:`tensors`."""

    @abc.abstractmethod
    def padded(self, columns: int, positions: int | None) -> Self:
        """The same draws with zeros up to C = ``columns`` and T = ``positions``, an exact change.

        Only the scale of K-FAC's E[a a^T], a mean over positions, sees the added ones.
        """

    @staticmethod
    def stack(
        parts: Sequence[GradientSamples], scales: Sequence[float] | None = None
    ) -> GradientSamples:
        """All draws of several samples of one m x n matrix, one after the other.

        Parts of different C or T are padded with zeros; parts of different kinds become matrices.

        Args:
            parts: At least one.
            scales: Part k's weights are multiplied by scales[k], so that H = sum_k scales[k] H_k:
                n_k / N for data loaded in batches, say. None keeps the weights.

        Raises:
            InvalidInputError: No parts, other shapes or devices, or not one scale >= 0 a part.
            MemoryBudgetError: The result would not fit.
        """
        _check_parts(parts)
        factors = check_scales(scales, len(parts))
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
        """The data at ``index``, with their weights as they are."""
        return self.with_tensors([tensor[index] for tensor in self.tensors], self.weights[index])

    def to(self, device: torch.device | str) -> Self:
        """The same samples on another device."""
        return self.with_tensors([t.to(device) for t in self.tensors], self.weights.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes that the draws hold."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def n_examples(self) -> int:
        """N, the independent draws."""
        return self.weights.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the draws live."""
        return self.weights.device

    def __len__(self) -> int:
        return self.n_examples

    def __repr__(self) -> str:
        m, n = self.shape
        shared = "" if self.n_positions is None else f", T={self.n_positions}"
        dropped = f", {self.dropped_energy:.2g} dropped" if self.dropped_energy > 0 else ""
        return (
            f"{type(self).__name__}({m} x {n}, N={self.n_examples}, C={self.n_columns}{shared}, "
            f"{self.nbytes / 1e6:.1f} MB{dropped})"
        )


@final
class FactoredSamples(GradientSamples):
    """G_ic = sum_t d_ict a_it^T, kept as (d, a).

    Attributes:
        output_grads: d, [N, C, T, m].
        inputs: a, [N, T, n].
        weights: float64 [N].
    """

    def __init__(
        self, output_grads: Tensor, inputs: Tensor, weights: Tensor, independent: bool = True,
        dropped_energy: float = 0.0,
    ) -> None:  # fmt: skip
        self.output_grads = output_grads
        self.inputs = inputs
        self.weights = weights
        self.independent = independent
        self.dropped_energy = dropped_energy

    @property
    def shape(self) -> tuple[int, int]:
        return self.output_grads.shape[3], self.inputs.shape[2]

    @property
    def n_columns(self) -> int:
        return self.output_grads.shape[1]

    @property
    def n_positions(self) -> int:
        return self.output_grads.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.output_grads, self.inputs

    def with_tensors(self, tensors: Sequence[Tensor], weights: Tensor) -> FactoredSamples:
        output_grads, inputs = tensors
        return FactoredSamples(output_grads, inputs, weights, self.independent, self.dropped_energy)

    def padded(self, columns: int, positions: int | None) -> FactoredSamples:
        more = (positions or self.n_positions) - self.n_positions
        if more == 0 and columns == self.n_columns:
            return self
        d = F.pad(self.output_grads, (0, 0, 0, more, 0, columns - self.n_columns))
        return self.with_tensors((d, F.pad(self.inputs, (0, 0, 0, more))), self.weights)

    def matrices(self, start: int = 0, stop: int | None = None) -> Tensor:
        d = self.output_grads[start:stop].double()
        a = self.inputs[start:stop].double()
        return d.mT @ a[:, None]

    def block(self, rows: slice, columns: slice) -> FactoredSamples:
        m, n = self.shape
        rows, columns = check_range("rows", rows, m), check_range("columns", columns, n)
        parts = self.output_grads[..., rows], self.inputs[..., columns]
        return self.with_tensors(parts, self.weights)


@final
class MatrixSamples(GradientSamples):
    """G_ic kept as matrices.

    Attributes:
        values: G, [N, C, m, n].
        weights: float64 [N].
    """

    def __init__(
        self, values: Tensor, weights: Tensor, independent: bool = True,
        dropped_energy: float = 0.0,
    ) -> None:  # fmt: skip
        self.values = values
        self.weights = weights
        self.independent = independent
        self.dropped_energy = dropped_energy

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[2], self.values.shape[3]

    @property
    def n_columns(self) -> int:
        return self.values.shape[1]

    @property
    def n_positions(self) -> None:
        return None

    @property
    def tensors(self) -> tuple[Tensor]:
        return (self.values,)

    def with_tensors(self, tensors: Sequence[Tensor], weights: Tensor) -> MatrixSamples:
        (values,) = tensors
        return MatrixSamples(values, weights, self.independent, self.dropped_energy)

    def padded(self, columns: int, positions: int | None) -> MatrixSamples:
        if columns == self.n_columns:
            return self
        more = columns - self.n_columns
        return self.with_tensors((F.pad(self.values, (0, 0, 0, 0, 0, more)),), self.weights)

    def matrices(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.values[start:stop].double()

    def block(self, rows: slice, columns: slice) -> MatrixSamples:
        m, n = self.shape
        rows, columns = check_range("rows", rows, m), check_range("columns", columns, n)
        return self.with_tensors((self.values[..., rows, columns],), self.weights)


def _check_parts(parts: Sequence[GradientSamples]) -> None:
    for part in parts:
        if not isinstance(part, GradientSamples):
            raise InvalidInputError(f"stack got a {type(part).__name__}; give GradientSamples.")
    if not parts:
        raise InvalidInputError("stack got no samples; give at least one set.")
    check_alike({part.shape for part in parts}, {str(part.device) for part in parts})


def _as_matrices(samples: GradientSamples) -> MatrixSamples:
    if isinstance(samples, MatrixSamples):
        return samples
    m, n = samples.shape
    size = 8 * samples.n_examples * samples.n_columns * m * n
    require_memory(size, f"The matrices of {samples!r}", samples.device)
    return MatrixSamples(
        samples.matrices(), samples.weights, samples.independent, samples.dropped_energy
    )
