"""How a parameter is seen as a matrix, and which of its two sides get a factor."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Side = Literal["left", "right"]


def matrix_shape(param: Tensor) -> tuple[int, int]:
    """(m, n): first dimension x all the others.

    A vector of length m is m x 1, a scalar is 1 x 1, and a convolution weight is out x (in k k).
    """
    m = param.shape[0] if param.ndim else 1
    return m, math.prod(param.shape[1:])


def side_size(shape: tuple[int, int], side: Side) -> int:
    """The size of a side: m for the left one, n for the right one."""
    return shape[0] if side == "left" else shape[1]


def preconditioned_sides(shape: tuple[int, int], max_dim: int) -> tuple[Side, ...]:
    """The sides that get a factor: those of a size from 2 to ``max_dim``; the others stay I."""
    both: tuple[Side, Side] = ("left", "right")
    return tuple(side for side in both if 1 < side_size(shape, side) <= max_dim)


def default_exponent(sides: tuple[Side, ...]) -> float:
    """-1/(2k) for k factors: their product has the power -1/2 of a second moment.

    That is -1/4 for a matrix and -1/2 for a vector or a matrix with one factor (Shampoo,
    arXiv 1802.09568; Distributed Shampoo, arXiv 2309.06497, with k the order of the tensor).
    """
    return -0.5 / len(sides)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's statistics: its own, but at least float32."""
    return torch.promote_types(dtype, torch.float32)
