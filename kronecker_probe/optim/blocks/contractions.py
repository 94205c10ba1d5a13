"""Products of stacked tensors with factors along one of their dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from kronecker_probe.optim.blocks.rounding import store
from kronecker_probe.optim.blocks.scratch import Scratch

# Rows of a panel: narrower ones compute and hold less, wider ones multiply faster.
PANEL = 64
# Sides from which a symmetric product is computed by its upper panels only.
PANELLED = 2 * PANEL


def unfold(blocks: Tensor, side: int) -> Tensor:
    """[K, r_side, rest] of ``blocks`` [K, r_0, r_1, ...]."""
    if blocks.ndim == 3:
        return blocks if side == 0 else blocks.mT
    moved = blocks.movedim(side + 1, 1)
    return moved.reshape(moved.shape[0], moved.shape[1], -1)


def panels(size: int) -> tuple[tuple[int, int, int], ...]:
    """(start, stop, offset) of the panels that a packed factor of this size holds.

    Each is the rows start:stop of the upper block triangle, [stop - start, size - start], one after
    the other; factors below ``PANELLED`` are a single, whole one.
    """
    if size < PANELLED:
        return ((0, size, 0),)
    found, offset = [], 0
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        found.append((start, stop, offset))
        offset += (stop - start) * (size - start)
    return tuple(found)


def packed_shape(size: int) -> tuple[int, ...]:
    """The shape in which a factor is held: [r, r], or from ``PANELLED`` on its panels' entries."""
    if size < PANELLED:
        return size, size
    start, stop, offset = panels(size)[-1]
    return (offset + (stop - start) * (size - start),)


def packed_identity(size: int, like: Tensor) -> Tensor:
    """The identity as it is held."""
    if size < PANELLED:
        return torch.eye(size, dtype=like.dtype, device=like.device)
    out = like.new_zeros(packed_shape(size))
    for start, stop, offset in panels(size):
        width = size - start
        out[offset : offset + (stop - start) * width].view(-1, width).fill_diagonal_(1.0)
    return out


def _panel(factor: Tensor, size: int, panel: tuple[int, int, int]) -> Tensor:
    """A view [K, stop - start, size - start] of packed factors."""
    start, stop, offset = panel
    rows, width = stop - start, size - start
    return factor[:, offset : offset + rows * width].view(-1, rows, width)


def add_outer(factor: Tensor, rows: Tensor, keep: float, weight: float, update: int = 1) -> None:
    """A <- keep A + weight X X^T, in place.

    Half of a symmetric product is redundant, and half of its memory: large factors hold and compute
    the panels on and above the diagonal, and :func:`completed` fills in the rest where it is read.

    Args:
        factor: A as it is held, [K, r, r] or [K, packed].
        rows: X, [K, r, s].
        keep: Of the old.
        weight: Of the new.
        update: Which update this is, counted from 1; by it a factor in bfloat16 is rounded.
    """
    if factor.ndim == 3:
        _accumulate(factor, rows, rows.mT, keep, weight, update)
        return
    size = rows.shape[1]
    for panel in panels(size):
        start, stop, _ = panel
        target = _panel(factor, size, panel)
        _accumulate(target, rows[:, start:stop], rows[:, start:].mT, keep, weight, update)


def _accumulate(
    target: Tensor, left: Tensor, right: Tensor, keep: float, weight: float, update: int
) -> None:
    """C <- keep C + weight A B, in place, computed in the dtype of A and B."""
    wide = target.to(left.dtype)
    if len(wide) == 1:  # one product instead of a batch of one
        wide[0].addmm_(left[0], right[0], beta=keep, alpha=weight)
    else:
        wide.baddbmm_(left, right, beta=keep, alpha=weight)
    if wide is not target:
        store(wide, target, update)


def packed(matrices: Tensor) -> Tensor:
    """Symmetric matrices [K, r, r] as they are held: their upper panels from ``PANELLED`` on."""
    size = matrices.shape[-1]
    if size < PANELLED:
        return matrices
    parts = [matrices[:, start:stop, start:].flatten(1) for start, stop, _ in panels(size)]
    return torch.cat(parts, dim=1)


def completed(factor: Tensor, size: int) -> Tensor:
    """A with both triangles, [K, r, r]; the factor itself where it is held so."""
    if factor.ndim == 3:
        return factor
    out = factor.new_empty(len(factor), size, size)
    for panel in panels(size):
        start, stop, _ = panel
        rows = _panel(factor, size, panel)
        out[:, start:stop, start:] = rows
        out[:, stop:, start:stop] = rows[:, :, stop - start :].mT
    return out


def per_block(numbers: Tensor, blocks: Tensor) -> Tensor:
    """A number a block, [K], as [K, 1, 1, ...] beside ``blocks`` [K, r_0, r_1, ...]."""
    return numbers.view(-1, *[1] * (blocks.ndim - 1))


def along(values: Tensor, side: int, blocks: Tensor) -> Tensor:
    """A number for each index of a side, [K, r_side], as [K, 1, r_side, 1] beside ``blocks``."""
    shape = [len(values), *[1] * (blocks.ndim - 1)]
    shape[side + 1] = values.shape[1]
    return values.view(shape)


def contract(
    blocks: Tensor, matrix: Tensor, side: int, scratch: Scratch | None = None, name: str = ""
) -> Tensor:
    """X x_side A: A [K, r, r] along one dimension of ``blocks``; sum_j A_ij X_..j...

    Args:
        blocks: X, [K, r_0, r_1, ...].
        matrix: A.
        side: Which dimension.
        scratch: Where to put the result, if it is not kept.
        name: Under which name.
    """
    if blocks.ndim == 3:
        out = None if scratch is None else scratch.take(name, blocks.shape, blocks)
        left, right = (matrix, blocks) if side == 0 else (blocks, matrix.mT)
        if len(blocks) == 1:  # one product instead of a batch of one
            return torch.mm(left[0], right[0], out=None if out is None else out[0])[None]
        return torch.bmm(left, right, out=out)
    moved = blocks.movedim(side + 1, 1)
    product = torch.bmm(matrix, moved.reshape(moved.shape[0], moved.shape[1], -1))
    return product.view(moved.shape).movedim(1, side + 1)
