"""Inputs and output gradients of a layer as the statistics of its weight or bias: K-FAC's."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.optim.blocks.contractions import add_outer

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Entries that a chunk of data may have, unfolded.
_CHUNK = 2**23


@dataclass(frozen=True)
class Call:
    """A call of a layer, with the gradient of its output.

    Attributes:
        layer: One of :data:`LAYERS`.
        inputs: As it got them.
        outputs: The gradient, of the shape of its output.
    """

    layer: Layer
    inputs: Tensor
    outputs: Tensor

    @property
    def has_batch(self) -> bool:
        """Whether the first dimension is one of data; without it the input is a single datum."""
        return self.inputs.ndim > (
            1 if isinstance(self.layer, nn.Linear) else self.layer.weight.ndim - 1
        )

    @functools.cached_property
    def is_finite(self) -> bool:
        """Whether inputs and output gradients are, and their squares, in float32 at least."""
        norms = [
            torch.linalg.vector_norm(one, dtype=torch.promote_types(one.dtype, torch.float32))
            for one in (self.inputs, self.outputs)
        ]
        return all(bool(norm.square().isfinite()) for norm in norms)

    @property
    def n_examples(self) -> int:
        """Data in the call."""
        return len(self.inputs) if self.has_batch else 1

    @property
    def n_positions(self) -> int:
        """Positions that a datum shares the layer at."""
        return self.outputs.numel() // max(1, self.n_examples * len(self.layer.weight))

    def output_rows(self, part: slice, dtype: torch.dtype) -> Tensor:
        """d of some data, [c, T, m]."""
        d = (self.outputs if self.has_batch else self.outputs[None])[part].to(dtype)
        if isinstance(self.layer, nn.Linear):
            return d.reshape(len(d), -1, d.shape[-1])
        return d.flatten(2).mT

    def input_rows(self, part: slice, dtype: torch.dtype) -> Tensor:
        """a of some data, [c, T, n], as the weight flattens."""
        a = (self.inputs if self.has_batch else self.inputs[None])[part].to(dtype)
        if isinstance(self.layer, nn.Linear):
            return a.reshape(len(a), -1, a.shape[-1])
        return _patches(self.layer, a)


@dataclass
class Pass:
    """The calls of one backward pass: a datum has positions in each of them.

    Attributes:
        calls: The calls.
        scale: What the loss was multiplied by.
    """

    calls: list[Call] = field(default_factory=list)
    scale: float = 1.0

    def check(self, name: str) -> None:
        """Refuse calls with different numbers of data.

        Raises:
            UnsupportedError: It cannot be told which of them belong together.
        """
        counts = sorted({call.n_examples for call in self.calls})
        if len(counts) > 1:
            raise UnsupportedError(
                f"The layer of {name} was called with {counts} data in one backward pass, so that "
                "K-FAC cannot tell which of them belong together. Call backward() for each batch "
                "by itself, or leave the layer to a group with statistics.rule='gradient'."
            )

    @property
    def n_examples(self) -> int:
        """Data in each of the calls."""
        return self.calls[0].n_examples

    @property
    def is_finite(self) -> bool:
        """Whether all that was recorded is, and its squares."""
        return all(call.is_finite for call in self.calls)


@final
class LayerSamples:
    """What a step knows of the inputs a and output gradients d of a parameter.

    A gradient is G_i = sum_t d_it a_it^T for datum i, t over positions and calls; for a bias a is
    1. In the expand form of K-FAC (arXiv 2311.00636) B = (1/N) sum d d^T, and A is the mean of
    a a^T over data and positions.

    Args:
        passes: Backward passes, not empty; N counts the data of all of them.
        is_bias: Whether of the bias.
        reduction: "mean": the recorded d are those of a mean over all N data, so that the own ones
            are N times as large; "sum".
    """

    def __init__(self, passes: Sequence[Pass], is_bias: bool, reduction: str) -> None:
        self._passes = passes
        self._is_bias = is_bias
        self._total = sum(one.n_examples for one in passes)
        self._positions = sum(c.n_examples * c.n_positions for one in passes for c in one.calls)
        # of a square of recorded d in a mean of squares of own ones
        self._scale = float(self._total) if reduction == "mean" else 1.0 / max(1, self._total)

    def add_factor(
        self, factor: Tensor, side: int, keep: float, weight: float, update: int
    ) -> None:
        """F <- keep F + weight B (side 0) or A (side 1), in place, as ``add_outer`` does it.

        Args:
            factor: F, [r, r].
            side: Which dimension of the m x n parameter.
            keep: Of the old.
            weight: Of the new.
            update: Which update this is.
        """
        weight *= self._scale if side == 0 else 1.0 / max(1, self._positions)
        dtype = torch.promote_types(factor.dtype, torch.float32)
        for outputs, inputs in self._chunks(dtype, only=side):
            rows = outputs if side == 0 else inputs
            add_outer(factor[None], rows.flatten(0, 1).mT[None], keep, weight, update)
            keep = 1.0

    def add_squares(self, moment: Tensor, left: Tensor, right: Tensor, weight: float) -> None:
        """D <- D + weight E[(Q_L^T G_i Q_R)^2], in place.

        Args:
            moment: D, [m, n].
            left: Q_L, [m, m].
            right: Q_R, [n, n].
            weight: Of the new.
        """
        weight *= self._scale
        for outputs, inputs in self._chunks(moment.dtype):
            d, a = outputs @ left, inputs @ right
            if d.shape[1] == 1:  # (d a^T)^2 = d^2 (a^2)^T without the matrices themselves
                moment.addmm_(d[:, 0].square().mT, a[:, 0].square(), alpha=weight)
            else:
                moment.add_((d.mT @ a).square_().sum(0), alpha=weight)

    def _chunks(
        self, dtype: torch.dtype, only: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """d [c, T, m] and a [c, T, n] of all data, in chunks; empty the one not asked for."""
        for one in self._passes:
            first = one.calls[0]
            weight = first.layer.weight
            n = 1 if self._is_bias else weight[0].numel()
            entries = sum(call.n_positions for call in one.calls) * (len(weight) + n)
            entries += len(weight) * n if only is None else 0
            size = max(1, _CHUNK // max(1, entries))
            for start in range(0, one.n_examples, size):
                part = slice(start, start + size)
                blank = first.outputs.new_empty(0, 0, 0)
                d = blank if only == 1 else _joined([c.output_rows(part, dtype) for c in one.calls])
                d = d / one.scale if one.scale != 1.0 else d
                if only == 0:
                    yield d, blank
                elif self._is_bias:
                    rows = [c.output_rows(part, dtype)[..., :1] for c in one.calls]
                    yield d, torch.ones_like(_joined(rows))
                else:
                    yield d, _joined([c.input_rows(part, dtype) for c in one.calls])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _patches(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """[c, P, in k k] of images [c, in, ...], by the padding, stride and dilation of ``layer``."""
    sides = layer._reversed_padding_repeated_twice
    if any(sides):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, sides, mode=mode)
    spatial = len(layer.kernel_size)
    for k in range(spatial):
        reach = layer.dilation[k] * (layer.kernel_size[k] - 1) + 1
        x = x.unfold(2 + k, reach, layer.stride[k])[..., :: layer.dilation[k]]
    # [c, in, *pixels, *kernel] -> [c, *pixels, in, *kernel]
    moved = x.movedim(1, 1 + spatial)
    return moved.reshape(len(x), -1, x.shape[1] * x.shape[2 + spatial :].numel())
