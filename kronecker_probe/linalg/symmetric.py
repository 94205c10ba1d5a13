"""Products with and into symmetric matrices, at half the operations, in panels.

Skew matrices, A^T = -A, go the same way with ``sign`` = -1.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of one panel: wide enough for fast products, narrow enough to skip half of a matrix.
PANEL = 128


def panel_share(size: int) -> float:
    """Share of a full product that a panelled one of this ``size`` computes."""
    panels = -(-size // PANEL)
    return (panels + 1) / (2 * panels)


def add_upper(out: Tensor, x: Tensor, y: Tensor) -> None:
    """Add X^T Y to the upper panels of ``out``; the rest is left to :func:`mirror`.

    Args:
        out: float64 [k, k].
        x: [M, k], float64 or float32; the products are in this dtype.
        y: [M, k], such that X^T Y, summed over all calls, is symmetric or skew.
    """
    part = out if x.dtype == out.dtype else torch.zeros_like(out, dtype=x.dtype)
    for start in range(0, out.shape[0], PANEL):
        part[start : start + PANEL, start:].addmm_(x[:, start : start + PANEL].T, y[:, start:])
    if part is not out:
        out += part


def mirror(out: Tensor, sign: int = 1) -> Tensor:
    """Fill the lower triangle of ``out`` [k, k] from the upper one, in place, and return it."""
    for start in range(0, out.shape[0], PANEL):
        stop = min(start + PANEL, out.shape[0])
        out[stop:, start:stop] = sign * out[start:stop, stop:].T
        block = out[start:stop, start:stop]
        block.copy_(0.5 * (block + sign * block.T))
    return out


def half_of(matrix: Tensor) -> Tensor:
    """S, zero below its panels' diagonal, with ``matrix`` = S + S^T, or S - S^T if skew."""
    half = torch.zeros_like(matrix)
    for start in range(0, matrix.shape[0], PANEL):
        stop = min(start + PANEL, matrix.shape[0])
        half[start:stop, stop:] = matrix[start:stop, stop:]
        half[start:stop, start:stop] = 0.5 * matrix[start:stop, start:stop]
    return half


def times_half(x: Tensor, half: Tensor) -> Tensor:
    """X S of ``x`` [..., k] and the ``half`` [k, k] of a symmetric or skew matrix."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows)
    for start in range(0, half.shape[0], PANEL):
        stop = min(start + PANEL, half.shape[0])
        out[:, start:stop].addmm_(rows[:, :stop], half[:stop, start:stop], beta=0)
    return out.view(x.shape)


class Packing:
    """Symmetric, or skew, k x k matrices as vectors with the same inner products.

    Args:
        size: k.
        device: Where the vectors live.
        sign: 1 for symmetric matrices, -1 for skew ones.
    """

    def __init__(self, size: int, device: torch.device, sign: int = 1) -> None:
        self.size, self.sign = size, sign
        rows, columns = torch.triu_indices(size, size, 0 if sign == 1 else 1, device=device)
        self._upper = rows * size + columns
        self._lower = columns * size + rows
        self._scale = torch.where(rows == columns, 1.0, 2.0).double().sqrt()

    def __len__(self) -> int:
        return len(self._upper)

    def pack(self, matrix: Tensor) -> Tensor:
        """The vector of ``matrix`` [k, k], in its dtype."""
        return matrix.reshape(-1)[self._upper] * self._scale.to(matrix.dtype)

    def unpack(self, vector: Tensor) -> Tensor:
        """The matrix of a ``vector``, [k, k]."""
        entries = vector / self._scale.to(vector.dtype)
        out = vector.new_zeros(self.size * self.size)
        out[self._lower] = self.sign * entries
        out[self._upper] = entries
        return out.view(self.size, self.size)
