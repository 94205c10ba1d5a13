"""A diagonal operator in the coordinates of the parameter."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.operators.base import Operator, check_nonnegative


@final
class DiagonalOperator(Operator):
    """P: G -> D o G, what Adam and AdaGrad hold.

    Args:
        values: D, [m, n], nonnegative.
    """

    inner_rank = 0

    def __init__(self, values: Tensor) -> None:
        if values.ndim != 2:
            raise InvalidInputError(f"A diagonal has shape [m, n]; got {list(values.shape)}.")
        self.shape, self.device = (values.shape[0], values.shape[1]), values.device
        self.values = values.detach().double()
        check_nonnegative("values", self.values)

    def norm(self) -> float:
        return float(torch.linalg.vector_norm(self.values))

    def trace(self) -> float:
        return float(self.values.sum())

    def _inner(self, other: Operator) -> float:
        return float((self.values * other.diagonal()).sum())

    def power(self, p: float) -> DiagonalOperator:
        """P^p entrywise; for p <= 0 zero entries stay zero."""
        if not math.isfinite(p):
            raise InvalidInputError(f"power got p={p}; give a finite exponent.")
        powered = self.values.clamp_min(torch.finfo(torch.float64).tiny).pow(p)
        return DiagonalOperator(torch.where(self.values > 0, powered, torch.zeros_like(powered)))

    def projected_diagonal(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        return left_basis.square().T @ self.values @ right_basis.square()

    def diagonal(self) -> Tensor:
        return self.values

    def kronecker_inner(self, left: Tensor, right: Tensor) -> float:
        return float(left.diagonal() @ self.values @ right.diagonal())

    def block(self, rows: slice, columns: slice) -> DiagonalOperator:
        return DiagonalOperator(self.values[rows, columns])

    def _apply(self, x: Tensor) -> Tensor:
        return self.values * x

    def __repr__(self) -> str:
        return f"DiagonalOperator({self.shape[0]} x {self.shape[1]})"
