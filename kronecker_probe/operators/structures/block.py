"""An operator that is zero across the blocks of a partition of the m x n matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import final

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, UnsupportedError
from kronecker_probe.operators.base import Operator


def spans(size: int, block_size: int) -> list[slice]:
    """Consecutive ranges of ``block_size`` that cover ``size``; the last may be shorter."""
    return [slice(i, min(i + block_size, size)) for i in range(0, size, block_size)]


@final
class BlockOperator(Operator):
    """P: each block of G, rows x columns of a grid, is mapped by an operator of its own.

    Args:
        grid: Operators by block row and block column. Those of a block row share m, those of a
            block column share n.

    Raises:
        InvalidInputError: The grid is empty or ragged, or its shapes do not line up.
    """

    inner_rank = 2

    def __init__(self, grid: Sequence[Sequence[Operator]]) -> None:
        if not grid or not grid[0]:
            raise InvalidInputError("A block operator got no blocks; give a grid of operators.")
        rows = [row[0].shape[0] for row in grid]
        columns = [one.shape[1] for one in grid[0]]
        for i, row in enumerate(grid):
            shapes = [one.shape for one in row]
            if shapes != [(rows[i], n) for n in columns]:
                raise InvalidInputError(
                    f"Block row {i} has shapes {shapes}; a grid with columns of {columns} needs "
                    f"{[(rows[i], n) for n in columns]}."
                )
        self.rows = _ranges(rows)
        self.columns = _ranges(columns)
        self.grid = tuple(tuple(row) for row in grid)
        self.shape, self.device = (sum(rows), sum(columns)), grid[0][0].device

    @property
    def blocks(self) -> list[tuple[slice, slice, Operator]]:
        """(rows, columns, operator) of every block."""
        return [
            (rows, columns, one)
            for rows, line in zip(self.rows, self.grid, strict=True)
            for columns, one in zip(self.columns, line, strict=True)
        ]

    @property
    def info(self) -> dict[str, float]:
        """The largest of each number that the blocks report: rounds, residual."""
        found: dict[str, float] = {}
        for _, _, one in self.blocks:
            for key, value in getattr(one, "info", {}).items():
                found[key] = max(value, found.get(key, value))
        return found

    def norm(self) -> float:
        return math.hypot(*(one.norm() for _, _, one in self.blocks))

    def trace(self) -> float:
        return math.fsum(one.trace() for _, _, one in self.blocks)

    def _inner(self, other: Operator) -> float:
        return math.fsum(one.inner(other.block(r, c)) for r, c, one in self.blocks)

    def power(self, p: float) -> BlockOperator:
        """P^p, block by block; for p <= 0 the pseudo-inverse power.

        Raises:
            UnsupportedError: A block has no powers.
        """
        return BlockOperator([[_power(one, p) for one in row] for row in self.grid])

    def projected_diagonal(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        out = left_basis.new_zeros(left_basis.shape[1], right_basis.shape[1])
        for rows, columns, one in self.blocks:
            out += one.projected_diagonal(left_basis[rows], right_basis[columns])
        return out

    def diagonal(self) -> Tensor:
        lines = [torch.cat([one.diagonal() for one in row], dim=1) for row in self.grid]
        return torch.cat(lines)

    def kronecker_inner(self, left: Tensor, right: Tensor) -> float:
        return math.fsum(
            one.kronecker_inner(left[rows, rows], right[columns, columns])
            for rows, columns, one in self.blocks
        )

    def block(self, rows: slice, columns: slice) -> Operator:
        on_rows = [(i, part) for i, r in enumerate(self.rows) if (part := _within(r, rows))]
        on_columns = [
            (k, part) for k, c in enumerate(self.columns) if (part := _within(c, columns))
        ]
        grid = [[_part(self.grid[i][k], r, c) for k, c in on_columns] for i, r in on_rows]
        return grid[0][0] if len(grid) == len(grid[0]) == 1 else BlockOperator(grid)

    def _apply(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for rows, columns, one in self.blocks:
            out[:, rows, columns] = one._apply(x[:, rows, columns])
        return out

    def __repr__(self) -> str:
        m, n = self.shape
        return f"BlockOperator({m} x {n}, {len(self.rows)} x {len(self.columns)} blocks)"


def _ranges(sizes: Sequence[int]) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]


def _within(own: slice, wanted: slice) -> slice | None:
    """The part of the range ``own`` that is ``wanted``, counted from the start of ``own``."""
    start, stop = max(own.start, wanted.start), min(own.stop, wanted.stop)
    return slice(start - own.start, stop - own.start) if start < stop else None


def _part(operator: Operator, rows: slice, columns: slice) -> Operator:
    whole = (rows.stop - rows.start, columns.stop - columns.start) == operator.shape
    return operator if whole else operator.block(rows, columns)


def _power(operator: Operator, p: float) -> Operator:
    power = getattr(operator, "power", None)
    if power is None:
        raise UnsupportedError(f"{operator!r} has no powers, so its block operator has none.")
    found: Operator = power(p)
    return found
