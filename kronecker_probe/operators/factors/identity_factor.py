"""The identity as one side of a Kronecker product, formed only when asked for."""

from __future__ import annotations

import math
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from kronecker_probe.operators.factors.factor import Eigen, Eigenbasis, Factor
from kronecker_probe.operators.factors.vectors import Rows


@final
class IdentityFactor(Factor):
    """I, [k, k].

    Args:
        size: k.
        device: Where it counts as living.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._size = size
        self._device = device

    @property
    def size(self) -> int:
        return self._size

    @property
    def device(self) -> torch.device:
        return self._device

    @cached_property
    def matrix(self) -> Tensor:
        return torch.eye(self._size, dtype=torch.float64, device=self._device)

    def trace(self) -> float:
        return float(self._size)

    def norm(self) -> float:
        return math.sqrt(self._size)

    def quadratic_forms(self, rows: Rows) -> Tensor:
        return rows.squared_norms

    def inner(self, other: Factor) -> float:
        return other.trace()

    def diagonal(self) -> Tensor:
        return torch.ones(self._size, dtype=torch.float64, device=self._device)

    def eigen(self) -> Eigen:
        ones = torch.ones(self._size, dtype=torch.float64, device=self._device)
        return Eigen(ones, Eigenbasis.of(self.matrix))

    def power(self, p: float) -> Factor:
        return self
