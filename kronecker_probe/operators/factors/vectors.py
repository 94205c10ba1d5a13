"""The vectors that one side's factors are sums of, with the Grams that they share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from kronecker_probe.linalg import gram


@final
class Rows:
    """x_ic in R^k for N examples and C columns: output gradients (k = m) or inputs (k = n).

    All factors built from one target share its Rows, hence their Grams.

    Attributes:
        values: [N, C, k], in the dtype they were captured in.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._whole: tuple[Rows, slice | Tensor | Sequence[int]] | None = None

    def subset(self, index: slice | Tensor | Sequence[int]) -> Rows:
        """The vectors of some of the examples; their Grams are cut out of these."""
        part = Rows(self.values[index])
        part._whole = self, index
        return part

    @property
    def size(self) -> int:
        """k."""
        return self.values.shape[2]

    @property
    def count(self) -> int:
        """N C, the number of vectors."""
        return self.values.shape[0] * self.values.shape[1]

    @cached_property
    def gram(self) -> Tensor:
        """X X^T, float64 [N C, N C]."""
        if self._whole is not None and self.values.shape[1] == 1:
            rows, index = self._whole
            return principal(rows.gram, index)
        return gram.gram(self.values.flatten(0, 1))

    @cached_property
    def squared_gram(self) -> Tensor:
        """sum_cd <x_ic, x_jd>^2, float64 [N, N]: inner products of sum_c x_ic x_ic^T."""
        if self._whole is not None:
            rows, index = self._whole
            return principal(rows.squared_gram, index)
        if self.values.shape[1] == 1:  # roots will need the Gram itself
            return self.gram.square()
        return gram.squared_gram(self.values)

    @cached_property
    def squared_norms(self) -> Tensor:
        """sum_c |x_ic|^2, float64 [N]."""
        return gram.squared_norms(self.values)

    def outer_sum(self, weights: Tensor) -> Tensor:
        """sum_i u_i sum_c x_ic x_ic^T, float64 [k, k]."""
        return gram.weighted_outer(self.values, weights)

    def quadratic_forms(self, matrix: Tensor) -> Tensor:
        """sum_c x_ic^T A x_ic, float64 [N]."""
        return gram.quadratic_forms(self.values, matrix)


def principal(matrix: Tensor, index: slice | Tensor | Sequence[int]) -> Tensor:
    """Rows and columns ``index`` of a square matrix."""
    if isinstance(index, Tensor) and index.dtype == torch.int64:  # much faster than indexing
        return matrix.index_select(0, index).index_select(1, index)
    return matrix[index][:, index]
