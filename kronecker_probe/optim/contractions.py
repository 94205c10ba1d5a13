"""Products of stacked tensors with factors along one of their dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from kronecker_probe.linalg.symmetric import PANEL

# Sides from which a symmetric product is computed by its upper panels only.
PANELLED = 2 * PANEL


def unfold(blocks: Tensor, side: int) -> Tensor:
    """[K, r_side, rest] of ``blocks`` [K, r_0, r_1, ...]."""
    if blocks.ndim == 3:
        return blocks if side == 0 else blocks.mT
    moved = blocks.movedim(side + 1, 1)
    return moved.reshape(moved.shape[0], moved.shape[1], -1)


def add_outer(factor: Tensor, rows: Tensor, keep: float, weight: float) -> None:
    """A <- keep A + weight X X^T, of which only the upper panels of large sides are kept valid.

    Half of a symmetric product is redundant: sides of at least ``PANELLED`` compute the panels on
    and above the diagonal, and :func:`completed` fills in the rest where it is read.

    Args:
        factor: A, [K, r, r], in place.
        rows: X, [K, r, s].
        keep: Of the old.
        weight: Of the new.
    """
    size = factor.shape[1]
    if size < PANELLED or factor.is_cuda:
        factor.baddbmm_(rows, rows.mT, beta=keep, alpha=weight)
        return
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        target = factor[:, start:stop, start:]
        if len(factor) == 1:
            target[0].addmm_(rows[0, start:stop], rows[0, start:].T, beta=keep, alpha=weight)
        else:
            target.baddbmm_(rows[:, start:stop], rows[:, start:].mT, beta=keep, alpha=weight)


def completed(factor: Tensor) -> Tensor:
    """A with the entries below its upper panels filled in from those above, [K, r, r]."""
    if factor.shape[1] < PANELLED or factor.is_cuda:
        return factor
    out = factor.triu()
    return out + out.triu(1).mT


def contract(blocks: Tensor, matrix: Tensor, side: int) -> Tensor:
    """X x_side A: A [K, r, r] along one dimension of ``blocks``; sum_j A_ij X_..j..."""
    if blocks.ndim == 3:
        if len(blocks) == 1:  # one product instead of a batch of one
            x, a = blocks[0], matrix[0]
            return (a @ x if side == 0 else x @ a.T)[None]
        return torch.bmm(matrix, blocks) if side == 0 else torch.bmm(blocks, matrix.mT)
    moved = blocks.movedim(side + 1, 1)
    product = torch.bmm(matrix, moved.reshape(moved.shape[0], moved.shape[1], -1))
    return product.view(moved.shape).movedim(1, side + 1)
