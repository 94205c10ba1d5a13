"""Pulled-back gradients, column by column, into the samples of each parameter."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kronecker_probe.gradients.layers.base import Call, Form, ProductRule
from kronecker_probe.gradients.samples.base import (
    EmbeddingSamples,
    FactoredSamples,
    GradientSamples,
    MatrixSamples,
)
from kronecker_probe.gradients.tracing.graph import Uses

# A view of more than this share of foreign memory is copied, so that samples hold only their own.
_SLACK = 1.2


@dataclass(frozen=True)
class Extent:
    """Sizes that all parameters of a capture share."""

    n_examples: int
    columns: int


class Block(abc.ABC):
    """The samples of one parameter in the making.

    Attributes:
        uses: The calls that add up to the gradient, each with the parameter's role.
    """

    def __init__(self, uses: Uses, shape: tuple[int, int], extent: Extent) -> None:
        self.uses = uses
        self.shape = shape
        self.extent = extent

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """Bytes that the samples will hold."""

    @property
    def workspace(self) -> int:
        """Bytes that making them takes besides."""
        return 0

    @abc.abstractmethod
    def add(self, column: int, gradients: Mapping[Call, Tensor]) -> None:
        """Take in the gradients of one column of all examples."""

    @abc.abstractmethod
    def samples(self, weights: Tensor) -> GradientSamples:
        """The samples, when all columns are in."""

    def rows(self, call: Call, role: str) -> slice:
        """The rows of the parameter that the call read."""
        rows = call.reads[role].rows
        return slice(None) if rows is None else slice(*rows)

    def dtype(self, least: torch.dtype | None = None) -> torch.dtype:
        """Of the gradients, at least ``least``."""
        kinds = [call.output_dtype for call, _ in self.uses] + ([least] if least else [])
        result = kinds[0]
        for kind in kinds[1:]:
            result = torch.promote_types(result, kind)
        return result


def block_for(uses: Uses, shape: tuple[int, int], extent: Extent) -> Block:
    """The leanest form that holds the gradient of all ``uses``."""
    forms = {call.rule.form(role, call) for call, role in uses}
    if forms == {Form.FACTORS}:
        return FactorBlock(uses, shape, extent)
    if forms == {Form.TOKENS}:
        return TokenBlock(uses, shape, extent)
    if forms == {Form.VECTOR}:
        return VectorBlock(uses, shape, extent)
    return MatrixBlock(uses, shape, extent)


class _PositionBlock(Block):
    """One row of d for every position of every call.

    Attributes:
        slices_outputs: Whether a slice of the parameter's rows is one of the entries of d.
    """

    slices_outputs = True

    def __init__(self, uses: Uses, shape: tuple[int, int], extent: Extent) -> None:
        super().__init__(uses, shape, extent)
        self.lengths = [call.positions(role) for call, role in uses]
        self.total = sum(self.lengths)
        self.partial = self.slices_outputs and any(
            call.reads[role].rows is not None for call, role in uses
        )
        self.block: Tensor | None = None

    def _write(self, column: int, gradients: Mapping[Call, Tensor], width: int) -> None:
        n_examples, columns = self.extent.n_examples, self.extent.columns
        if columns == 1 and len(self.uses) == 1 and not self.partial:
            call, role = self.uses[0]
            self.block = _own(call.outputs(role, gradients[call])[:, None])
            return
        if self.block is None:
            device = self.uses[0][0].x.device
            shape = (n_examples, columns, self.total, width)
            make = torch.zeros if self.partial else torch.empty
            self.block = make(shape, dtype=self.dtype(), device=device)
        start = 0
        for (call, role), length in zip(self.uses, self.lengths, strict=True):
            rows = self.rows(call, role) if self.partial else slice(None)
            d = call.outputs(role, gradients[call])
            self.block[:, column, start : start + length, rows] = d
            start += length


@final
class FactorBlock(_PositionBlock):
    """(d, a); with ``bias``, the inputs have a last column of ones: [W b]."""

    bias = False

    @property
    def nbytes(self) -> int:
        m, n = self.shape
        d = self.extent.columns * self.total * m * self.dtype().itemsize
        a = self.total * (n + self.bias) * self._input_dtype().itemsize
        return self.extent.n_examples * (d + a)

    def add(self, column: int, gradients: Mapping[Call, Tensor]) -> None:
        self._write(column, gradients, self.shape[0])

    def samples(self, weights: Tensor) -> FactoredSamples:
        assert self.block is not None
        return FactoredSamples(self.block, self._inputs(), weights)

    def _input_dtype(self) -> torch.dtype:
        result = self.uses[0][0].x.dtype
        for call, _ in self.uses[1:]:
            result = torch.promote_types(result, call.x.dtype)
        return result

    def _inputs(self) -> Tensor:
        if len(self.uses) == 1 and not self.bias:
            call, role = self.uses[0]
            return _own(call.inputs(role))
        shape = (self.extent.n_examples, self.total, self.shape[1] + self.bias)
        a = torch.ones(shape, dtype=self._input_dtype(), device=self.uses[0][0].x.device)
        start = 0
        for (call, role), length in zip(self.uses, self.lengths, strict=True):
            a[:, start : start + length, : self.shape[1]] = call.inputs(role)
            start += length
        return a


@final
class TokenBlock(_PositionBlock):
    """(tokens, d) of embeddings; a slice of the table moves its tokens."""

    slices_outputs = False

    @property
    def nbytes(self) -> int:
        d = self.extent.columns * self.shape[1] * self.dtype().itemsize
        return self.extent.n_examples * self.total * (d + torch.int64.itemsize)

    def add(self, column: int, gradients: Mapping[Call, Tensor]) -> None:
        self._write(column, gradients, self.shape[1])

    def samples(self, weights: Tensor) -> EmbeddingSamples:
        assert self.block is not None
        tokens = torch.cat(
            [
                call.inputs(role)[..., 0].long() + self._first(call, role)
                for call, role in self.uses
            ],
            dim=1,
        )
        return EmbeddingSamples(tokens, self.block, self.shape[0], weights)

    def _first(self, call: Call, role: str) -> int:
        """The row of the table that is the call's token 0."""
        rows = call.reads[role].rows
        return 0 if rows is None else rows[0]


@final
class VectorBlock(Block):
    """[N, C, 1, m] with inputs of ones, summed over calls and positions."""

    block: Tensor | None = None

    @property
    def nbytes(self) -> int:
        size = self.extent.columns * self.shape[0] + 1
        return self.extent.n_examples * size * self.dtype(torch.float32).itemsize

    def add(self, column: int, gradients: Mapping[Call, Tensor]) -> None:
        if self.block is None:
            shape = (self.extent.n_examples, self.extent.columns, 1, self.shape[0])
            device = self.uses[0][0].x.device
            self.block = torch.zeros(shape, dtype=self.dtype(torch.float32), device=device)
        for call, role in self.uses:
            d = call.outputs(role, gradients[call])
            self.block[:, column, 0, self.rows(call, role)] += d.sum(1, dtype=self.block.dtype)

    def samples(self, weights: Tensor) -> FactoredSamples:
        assert self.block is not None
        return FactoredSamples(self.block, _ones(self.block), weights)


@final
class SameVectorBlock(Block):
    """A bias whose gradients are those of its weight's outputs: held once."""

    def __init__(self, source: FactorBlock, uses: Uses) -> None:
        super().__init__(uses, (source.shape[0], 1), source.extent)
        self.source = source

    @property
    def nbytes(self) -> int:
        return self.extent.n_examples * self.dtype().itemsize

    def add(self, column: int, gradients: Mapping[Call, Tensor]) -> None:
        pass

    def samples(self, weights: Tensor) -> FactoredSamples:
        assert self.source.block is not None
        return FactoredSamples(self.source.block, _ones(self.source.block), weights)


@final
class MatrixBlock(Block):
    """G itself: groups of a convolution, or calls of different forms (a tied embedding)."""

    def __init__(self, uses: Uses, shape: tuple[int, int], extent: Extent) -> None:
        super().__init__(uses, shape, extent)
        self.block: Tensor | None = None
        self.inputs: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        size = self.extent.n_examples * self.extent.columns * math.prod(self.shape)
        return size * self.dtype(torch.float32).itemsize

    @property
    def workspace(self) -> int:
        rules = [(call.rule, call) for call, _ in self.uses]
        return sum(rule.input_bytes(call) for rule, call in rules if isinstance(rule, ProductRule))

    def add(self, column: int, gradients: Mapping[Call, Tensor]) -> None:
        if self.block is None:
            shape = (self.extent.n_examples, self.extent.columns, *self.shape)
            device = self.uses[0][0].x.device
            self.block = torch.zeros(shape, dtype=self.dtype(torch.float32), device=device)
            self.inputs = [call.inputs(role) for call, role in self.uses]
        for (call, role), a in zip(self.uses, self.inputs, strict=True):
            d = call.outputs(role, gradients[call]).to(self.block.dtype)
            g = call.matrices(role, d, a)
            self.block[:, column, self.rows(call, role)] += g.view(len(g), -1, self.shape[1])

    def samples(self, weights: Tensor) -> MatrixSamples:
        assert self.block is not None
        return MatrixSamples(self.block, weights)


def share_outputs(blocks: dict[str, Block]) -> None:
    """Let biases of unshared layers read the block of their weight instead of one of their own."""
    sources = {
        block.uses[0][0]: block
        for block in blocks.values()
        if isinstance(block, FactorBlock)
        and len(block.uses) == 1
        and block.total == 1
        and not block.partial
    }
    for name, block in blocks.items():
        if isinstance(block, VectorBlock) and len(block.uses) == 1:
            call, role = block.uses[0]
            if role == "bias" and call in sources and call.reads[role].rows is None:
                blocks[name] = SameVectorBlock(sources[call], block.uses)


def joined(weight: GradientSamples, bias: GradientSamples) -> MatrixSamples:
    """[W b] as matrices, where the two do not come from the same calls."""
    held: Sequence[Tensor] = (*weight.tensors, *bias.tensors)
    kind = max((t.dtype for t in held if t.is_floating_point()), key=lambda k: k.itemsize)
    both = [one.matrices().to(kind) for one in (weight, bias)]
    return MatrixSamples(torch.cat(both, dim=3), weight.weights)


def _ones(d: Tensor) -> Tensor:
    return d.new_ones(d.shape[0], 1, 1)


def _own(tensor: Tensor) -> Tensor:
    """A tensor whose storage is its own: no view of a larger one, nor an expanded smaller one."""
    held = tensor.untyped_storage().nbytes()
    own = tensor.nbytes <= held <= _SLACK * tensor.nbytes
    return tensor if own else tensor.clone(memory_format=torch.contiguous_format)
