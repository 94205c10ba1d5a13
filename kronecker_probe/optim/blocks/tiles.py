"""How a parameter is cut into equal blocks, and how those are read and written."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronecker_probe.optim.options.sections import Shapes


@dataclass(frozen=True)
class Tile:
    """A rectangle of a parameter in a regular grid of equal blocks.

    Attributes:
        corner: The rectangle, a (start, stop) for each dimension.
        grid: Blocks along each dimension.
        block: Their shape.
    """

    corner: tuple[tuple[int, int], ...]
    grid: tuple[int, ...]
    block: tuple[int, ...]

    @property
    def count(self) -> int:
        """Blocks of the tile."""
        return math.prod(self.grid)

    def read(self, tensor: Tensor) -> Tensor:
        """The blocks, [count, *block]: a view where there is one block only.

        Args:
            tensor: The parameter in its merged shape.
        """
        return self._blocks(tensor).reshape(self.count, *self.block)

    def copy(self, tensor: Tensor, out: Tensor) -> None:
        """Copy the blocks of the parameter in its merged shape into ``out`` [count, *block]."""
        out.view(*self.grid, *self.block).copy_(self._blocks(tensor))

    def write(self, tensor: Tensor, blocks: Tensor) -> None:
        """Put ``blocks`` [count, *block] into their places."""
        self._blocks(tensor).copy_(blocks.view(*self.grid, *self.block))

    def _blocks(self, tensor: Tensor) -> Tensor:
        """A view [*grid, *block]."""
        part = tensor[tuple(slice(*ends) for ends in self.corner)]
        order = len(self.grid)
        split = part.view(*itertools.chain(*zip(self.grid, self.block, strict=True)))
        return split.permute(*range(0, 2 * order, 2), *range(1, 2 * order, 2))


@dataclass(frozen=True)
class Layout:
    """A parameter as a tensor of merged dimensions, cut into tiles.

    Attributes:
        shape: The merged shape: m x n unless dimensions are merged by size.
        tiles: They cover it.
    """

    shape: tuple[int, ...]
    tiles: tuple[Tile, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the parameter is a single block."""
        return len(self.tiles) == 1 and self.tiles[0].count == 1

    def assemble(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """The blocks of all tiles as one tensor of the parameter's shape."""
        if self.is_whole:
            return parts[0].reshape(like.shape)
        out = parts[0].new_empty(self.shape)
        for tile, blocks in zip(self.tiles, parts, strict=True):
            tile.write(out, blocks)
        return out.view(like.shape)


@functools.lru_cache(maxsize=4096)
def layout(shape: torch.Size, shapes: Shapes) -> Layout:
    """The layout of a parameter of this shape."""
    merged = _merged(tuple(shape), shapes.merge)
    pieces = [list(_pieces(size, shapes.block_size)) for size in merged]
    tiles = []
    for combination in itertools.product(*pieces):
        corner, grid, block = zip(*combination, strict=True)
        tiles.append(Tile(corner, grid, block))
    return Layout(merged, tuple(tiles))


def factored_sides(block: Sequence[int], shapes: Shapes, order: int) -> tuple[int, ...]:
    """The dimensions of a block that have a factor.

    Args:
        block: Its shape.
        shapes: The rule.
        order: Dimensions of the parameter itself.
    """
    if order <= 1 and shapes.vectors == "diagonal":
        return ()
    return tuple(k for k, size in enumerate(block) if 1 < size <= shapes.max_dim)


def _merged(shape: tuple[int, ...], threshold: int) -> tuple[int, ...]:
    """The matrix of the first dimension x the rest; or neighbours merged up to ``threshold``.

    The scan is that of Distributed Shampoo (arXiv 2309.06497): from the left, a dimension joins
    the last one if either is 1 or their product is at most the threshold.
    """
    if threshold == 0:
        return (shape[0] if shape else 1, math.prod(shape[1:]))
    merged: list[int] = []
    for size in shape:
        if merged and (merged[-1] == 1 or size == 1 or merged[-1] * size <= threshold):
            merged[-1] *= size
        else:
            merged.append(size)
    return tuple(merged) or (1,)


def _pieces(size: int, block: int | None) -> Iterator[tuple[tuple[int, int], int, int]]:
    """((start, stop), blocks, block size) of the part in full blocks, and of what remains."""
    if block is None or size <= block:
        yield (0, size), 1, size
        return
    full = size // block
    yield (0, full * block), full, block
    if full * block < size:
        yield (full * block, size), 1, size - full * block
