"""Inputs and output gradients of a layer's calls as the statistics of its weight or bias: K-FAC's.

What they are, patches of a convolution included, is said by the rules of
:mod:`kronecker_probe.gradients.layers`, as for captured gradient samples.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.gradients.layers.base import Call
from kronecker_probe.optim.blocks.contractions import add_outer

# Entries that a chunk of examples may have, unfolded.
_CHUNK = 2**23


@dataclass(frozen=True)
class Use:
    """A call that read a parameter, with the gradient of its output.

    Attributes:
        call: Its layout is known: examples come first, or there is one without a batch.
        gradient: Of the output.
        problem: Why the calls of its forward pass are not the whole gradient of the parameter;
            empty where they are.
    """

    call: Call
    gradient: Tensor
    problem: str

    @property
    def n_examples(self) -> int:
        """N."""
        return self.call.lead[0] if self.call.lead else 1

    @property
    def n_positions(self) -> int:
        """Positions at which an example reads the parameter."""
        return self.call.positions("weight")

    @functools.cached_property
    def is_finite(self) -> bool:
        """Whether inputs and output gradients are, and their squares, in float32 at least."""
        norms = [
            torch.linalg.vector_norm(one, dtype=torch.promote_types(one.dtype, torch.float32))
            for one in (self.call.x, self.gradient)
        ]
        return all(bool(norm.square().isfinite()) for norm in norms)

    def rows(self, part: slice, dtype: torch.dtype, side: int) -> Tensor:
        """d [c, T, m] (side 0) or a [c, T, n] (side 1) of some examples."""
        whole = part.start == 0 and part.stop >= self.n_examples
        call = self.call if whole else self.call.examples(part)
        if side == 1:
            return call.inputs("weight").to(dtype).contiguous()
        gradient = self.gradient if whole else self.call.examples_of(self.gradient, part)
        return call.outputs("weight", gradient).to(dtype)


@dataclass
class Pass:
    """The calls of one backward pass, each with positions of every example.

    Attributes:
        scale: What the loss was multiplied by.
        uses: The calls.
    """

    scale: float
    uses: list[Use] = field(default_factory=list)

    def check(self, name: str) -> None:
        """Refuse calls that are not the whole gradient, or of different numbers of examples.

        Raises:
            UnsupportedError: The message names the parameter and says why.
        """
        for use in self.uses:
            if use.problem:
                raise UnsupportedError(
                    f"What K-FAC recorded of {name} is not its whole gradient: {use.problem}. "
                    "Nothing was changed. Read it through layers alone, or put it into a group "
                    "with statistics={'rule': 'gradient'}."
                )
        counts = sorted({use.n_examples for use in self.uses})
        if len(counts) > 1:
            raise UnsupportedError(
                f"The layer of {name} was called with {counts} examples in one backward pass, so "
                "that K-FAC cannot tell which of them belong together. Call backward() for each "
                "batch by itself, or put it into a group with statistics={'rule': 'gradient'}."
            )

    @property
    def n_examples(self) -> int:
        """N in each of the calls."""
        return self.uses[0].n_examples

    @property
    def is_finite(self) -> bool:
        """Whether all that was recorded is, and its squares."""
        return all(use.is_finite for use in self.uses)


@final
class LayerSamples:
    """What a step knows of the inputs a and output gradients d of a parameter.

    A gradient is G_i = sum_t d_it a_it^T for example i, t over positions and calls; for a bias a is
    1. In the expand form of K-FAC (arXiv 2311.00636) B = (1/N) sum d d^T, and A is the mean of
    a a^T over examples and positions.

    Args:
        passes: Backward passes, not empty; N counts the examples of all of them.
        n: Entries of a; 1 for a bias.
        is_bias: Whether of the bias.
        reduction: "mean": the recorded d are those of a mean over all N examples, so that the own
            ones are N times as large; "sum".
    """

    def __init__(self, passes: Sequence[Pass], n: int, is_bias: bool, reduction: str) -> None:
        self._passes = passes
        self._n = n
        self._is_bias = is_bias
        self._total = sum(one.n_examples for one in passes)
        self._positions = sum(u.n_examples * u.n_positions for one in passes for u in one.uses)
        # of a square of recorded d in a mean of squares of own ones
        self._scale = float(self._total) if reduction == "mean" else 1.0 / max(1, self._total)

    def add_factor(
        self, factor: Tensor, side: int, keep: float, weight: float, update: int
    ) -> None:
        """F <- keep F + weight B (side 0) or A (side 1), in place, as ``add_outer`` does it."""
        weight *= self._scale if side == 0 else 1.0 / max(1, self._positions)
        dtype = torch.promote_types(factor.dtype, torch.float32)
        for one, part in self._chunks(only=side):
            rows = self._rows(one, part, dtype, side).flatten(0, 1)
            add_outer(factor[None], rows.mT[None], keep, weight, update)
            keep = 1.0

    def add_squares(self, moment: Tensor, left: Tensor, right: Tensor, weight: float) -> None:
        """D <- D + weight E[(Q_L^T G_i Q_R)^2], [m, n], in place, with Q_L [m, m], Q_R [n, n]."""
        weight *= self._scale
        for one, part in self._chunks():
            d, a = (self._rows(one, part, moment.dtype, side) for side in (0, 1))
            d, a = d @ left, a @ right
            if d.shape[1] == 1:  # (d a^T)^2 = d^2 (a^2)^T without the matrices themselves
                moment.addmm_(d[:, 0].square().mT, a[:, 0].square(), alpha=weight)
            else:
                moment.add_((d.mT @ a).square_().sum(0), alpha=weight)

    def _rows(self, one: Pass, part: slice, dtype: torch.dtype, side: int) -> Tensor:
        """d or a at the positions of all calls of a pass, [c, T, m] or [c, T, n]."""
        if side == 1 and self._is_bias:
            count = min(part.stop, one.n_examples) - part.start
            positions = sum(use.n_positions for use in one.uses)
            return torch.ones(count, positions, 1, dtype=dtype, device=one.uses[0].gradient.device)
        parts = [use.rows(part, dtype, side) for use in one.uses]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return rows / one.scale if side == 0 and one.scale != 1.0 else rows

    def _chunks(self, only: int | None = None) -> Iterator[tuple[Pass, slice]]:
        """Passes and some of their examples, as many as memory is meant for."""
        for one in self._passes:
            first = one.uses[0].call
            m = first.rule.width(first)
            entries = sum(use.n_positions for use in one.uses) * (m + self._n)
            entries += m * self._n if only is None else 0
            size = max(1, _CHUNK // max(1, entries))
            for start in range(0, one.n_examples, size):
                yield one, slice(start, start + size)
