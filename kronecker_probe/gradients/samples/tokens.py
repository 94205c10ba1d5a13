"""Draws of a table look-up's gradient, without one-hot inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.gradients.samples.base import GradientSamples
from kronecker_probe.gradients.samples.checks import (
    check_range,
    check_tensors,
    check_values,
    check_weights,
    dims,
)


@final
class EmbeddingSamples(GradientSamples):
    """G_ic = sum_t e_k(i,t) d_ict^T, V x D, kept as (k, d): the one-hot e is never formed.

    They have no ``n_positions``, because their inputs are the tokens and not vectors.

    Attributes:
        tokens: k, int64 [N, T].
        output_grads: d, [N, C, T, D].
        vocabulary: V.
        weights: float64 [N].
    """

    def __init__(
        self,
        tokens: Tensor,
        output_grads: Tensor,
        vocabulary: int,
        weights: Tensor,
        independent: bool = True,
    ) -> None:
        self.tokens = tokens
        self.output_grads = output_grads
        self.vocabulary = vocabulary
        self.weights = weights
        self.independent = independent

    @property
    def shape(self) -> tuple[int, int]:
        return self.vocabulary, self.output_grads.shape[3]

    @property
    def n_columns(self) -> int:
        return self.output_grads.shape[1]

    @property
    def n_positions(self) -> None:
        return None

    @property
    def n_slots(self) -> int:
        return self.tokens.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.tokens, self.output_grads

    def with_tensors(self, tensors: Sequence[Tensor], weights: Tensor) -> EmbeddingSamples:
        tokens, output_grads = tensors
        return EmbeddingSamples(tokens, output_grads, self.vocabulary, weights, self.independent)

    def padded(self, columns: int, positions: int | None) -> EmbeddingSamples:
        more = (positions or self.tokens.shape[1]) - self.tokens.shape[1]
        if more == 0 and columns == self.n_columns:
            return self
        d = F.pad(self.output_grads, (0, 0, 0, more, 0, columns - self.n_columns))
        return self.with_tensors((F.pad(self.tokens, (0, more)), d), self.weights)

    def matrices(self, start: int = 0, stop: int | None = None) -> Tensor:
        d = self.output_grads[start:stop].double()
        n_examples, columns, _, width = d.shape
        first = torch.arange(n_examples * columns, device=d.device).view(n_examples, columns, 1)
        rows = self.tokens[start:stop, None] + first * self.vocabulary
        g = d.new_zeros(n_examples * columns * self.vocabulary, width)
        g.index_add_(0, rows.flatten(), d.reshape(-1, width))
        return g.view(n_examples, columns, self.vocabulary, width)

    def block(self, rows: slice, columns: slice) -> EmbeddingSamples:
        v, width = self.shape
        rows, columns = check_range("rows", rows, v), check_range("columns", columns, width)
        inside = (self.tokens >= rows.start) & (self.tokens < rows.stop)
        tokens = torch.where(inside, self.tokens - rows.start, 0)
        d = self.output_grads[..., columns] * inside[:, None, :, None]
        return EmbeddingSamples(tokens, d, rows.stop - rows.start, self.weights, self.independent)


def embedding_samples(
    tokens: Tensor,
    output_grads: Tensor,
    vocabulary: int,
    weights: Tensor | Sequence[float] | None,
) -> EmbeddingSamples:
    """Checked samples; see :meth:`GradientSamples.from_embedding`."""
    check_tensors(tokens=tokens, output_grads=output_grads)
    d = output_grads[:, None] if output_grads.ndim == 3 else output_grads
    if tokens.ndim != 2 or d.ndim != 4 or (d.shape[0], d.shape[2]) != tuple(tokens.shape):
        raise InvalidInputError(
            f"from_embedding got tokens {dims(tokens)} and output_grads {dims(output_grads)}; "
            "give [N, T] with [N, T, D] or [N, C, T, D]."
        )
    if tokens.dtype not in (torch.int32, torch.int64):
        raise InvalidInputError(f"tokens have dtype {tokens.dtype}; give int64 indices.")
    check_values("output_grads", d)
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise InvalidInputError(
            f"tokens range over {int(tokens.min())}..{int(tokens.max())}, and vocabulary="
            f"{vocabulary}; every token must be in 0..{vocabulary - 1}."
        )
    if tokens.device != d.device:
        raise InvalidInputError(f"tokens are on {tokens.device} and output_grads on {d.device}.")
    checked = check_weights(weights, len(tokens), d.device)
    return EmbeddingSamples(tokens.long(), d.detach(), vocabulary, checked)
