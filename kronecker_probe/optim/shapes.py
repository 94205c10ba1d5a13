"""How a parameter is seen as a matrix, and which of its two sides get a factor."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import torch

Side = Literal["left", "right"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A parameter as an m x n matrix, first dimension x all the others.

    A vector of length m is m x 1, a scalar is 1 x 1, and a convolution weight is out x (in k k).

    Attributes:
        shape: (m, n).
        sides: The sides that have a factor: those of a size from 2 to the largest allowed. The
            others stay the identity.
    """

    shape: tuple[int, int]
    sides: tuple[Side, ...]

    def size(self, side: Side) -> int:
        """The size of a side: m for the left one, n for the right one."""
        return self.shape[0] if side == "left" else self.shape[1]

    @property
    def default_exponent(self) -> float:
        """-1/(2k) for k factors: their product has the power -1/2 of a second moment.

        That is -1/4 for a matrix and -1/2 for a vector or a matrix with one factor (Shampoo,
        arXiv 1802.09568; Distributed Shampoo, arXiv 2309.06497, with k the order of the tensor).
        """
        return -0.5 / len(self.sides)


@functools.lru_cache(maxsize=4096)
def layout(shape: torch.Size, max_dim: int) -> Layout:
    """The layout of a parameter of this shape, with factors on sides of at most ``max_dim``."""
    m, n = shape[0] if shape else 1, math.prod(shape[1:])
    sides: tuple[Side, ...] = ()
    if 1 < m <= max_dim:
        sides += ("left",)
    if 1 < n <= max_dim:
        sides += ("right",)
    return Layout((m, n), sides)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's statistics: its own, but at least float32."""
    return torch.promote_types(dtype, torch.float32)
