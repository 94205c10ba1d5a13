"""The preconditioner of a parameter as an operator on its matrix, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.structures.block import BlockOperator
from kronecker_probe.optim.engine.stack import Member, Stack

Corner = tuple[int, int]


def held_block(stack: Stack, row: int, step: int) -> Operator:
    """What a stack holds of one of its blocks."""
    return stack.preconditioner.operator(stack.state, row, step)


def operator_of(
    param: Tensor,
    stacks: Sequence[Stack],
    step: int,
    name: str,
    of_block: Callable[[Stack, int, int], Operator] = held_block,
) -> Operator:
    """The operators of a parameter's blocks, in their grid.

    Args:
        param: The parameter.
        stacks: Those of its group.
        step: Its steps.
        name: For messages.
        of_block: The operator of a block, from its stack, its place there and its step.

    Raises:
        UnsupportedError: There is no preconditioner yet, it is not resolved, or its blocks are no
            rectangles of the m x n matrix.
    """
    found: dict[Corner, Operator] = {}
    for stack in stacks:
        for member in stack.members:
            if member.param is param:
                _check_rectangles(member, name)
                found |= _member_operators(stack, member, step, name, of_block)
    rows = sorted({place[0] for place in found})
    columns = sorted({place[1] for place in found})
    if len(rows) == len(columns) == 1:
        return found[rows[0], columns[0]]
    return BlockOperator([[found[r, c] for c in columns] for r in rows])


def _check_rectangles(member: Member, name: str) -> None:
    shape = member.layout.shape
    if len(shape) > 2 and any(
        tile.grid[k] * tile.block[k] < size or tile.grid[k] > 1
        for tile in member.layout.tiles
        for k, size in enumerate(shape)
        if k > 0
    ):
        raise UnsupportedError(
            f"{name} is cut along several of its {len(shape)} merged dimensions, so that its "
            "blocks are no rectangles of the m x n matrix; use shapes.merge=0"
        )
    rows = member.param.shape[0] if member.param.ndim else 1
    if rows != shape[0]:
        raise UnsupportedError(
            f"{name} has its first dimension merged with others into {shape[0]}, so that its "
            "blocks are none of the m x n matrix; use shapes.merge=0"
        )


def _member_operators(
    stack: Stack,
    member: Member,
    step: int,
    name: str,
    of_block: Callable[[Stack, int, int], Operator],
) -> dict[Corner, Operator]:
    """Those of a tile, by the first row and column of each block."""
    one, tile = stack.preconditioner, member.blocks
    ready = one.ready(stack.state, step)
    columns = tile.grid[1] if len(tile.grid) > 1 else 1
    width = tile.block[1] if len(tile.block) > 1 else 1
    first = tile.corner[0][0], tile.corner[1][0] if len(tile.corner) > 1 else 0
    found: dict[Corner, Operator] = {}
    for k in range(tile.count):
        row = member.start + k
        if ready is False or (ready is not True and not bool(ready[row])):
            raise UnsupportedError(_not_yet(one.first, step, name))
        try:
            operator = of_block(stack, row, step)
        except UnsupportedError as error:
            raise UnsupportedError(f"{name}: {error}", error.code) from error
        i, j = divmod(k, columns)
        found[first[0] + i * tile.block[0], first[1] + j * width] = operator
    return found


def _not_yet(first: int, step: int, name: str) -> str:
    if step < first:
        return (
            f"no preconditioner yet: the first refresh is at step {first}, {step} steps were "
            f"taken ({name})"
        )
    return f"no preconditioner yet: no refresh of {name} succeeded in {step} steps"
