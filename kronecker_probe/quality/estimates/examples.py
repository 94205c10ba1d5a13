"""The independent examples of a target: shares, sizes, and |H|^2 over distinct pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from kronecker_probe.linalg.memory import require_memory
from kronecker_probe.operators.factors.vectors import principal
from kronecker_probe.operators.second_moment.kernels.choose import kernels_for
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.quality.estimates.replicates import leave_one_out

# The seed that deals examples to groups: examples in the order of their classes must be mixed.
GROUPING_SEED = 0
# Relative difference of squared norms that rounding explains.
SAME = 1e-9


@final
class Examples:
    """The examples of positive weight as a sample of one population, H = sum_i p_i H_i.

    Args:
        target: H.

    Attributes:
        target: H of the examples of positive weight.
        shares: p, their weights normalized to sum 1, float64 [N].
        scale: The sum of the weights.
    """

    def __init__(self, target: SecondMoment) -> None:
        weights = target.samples.weights
        positive = weights > 0
        if bool(positive.any()) and not bool(positive.all()):
            target = SecondMoment(target.samples.subset(positive.nonzero()[:, 0]))
        self.target = target
        weights = target.samples.weights
        self.scale = float(weights.sum())
        self.shares = weights / weights.sum()

    @property
    def count(self) -> int:
        """N."""
        return len(self.shares)

    @cached_property
    def sizes(self) -> Tensor:
        """|G_i|^2 = sum_c |G_ic|^2, float64 [N]."""
        return self.target.quadratic_forms(None, None)

    @cached_property
    def n_eff(self) -> float:
        """(sum |G_i|^2)^2 / sum |G_i|^4 with the weights inside; 0 for H = 0."""
        return _effective_count(self.shares * self.sizes)

    @cached_property
    def n_eff_of_factors(self) -> float:
        """The least of the effective numbers of G_i, d_i and a_i: K-FAC averages d and a apart.

        An example of large d and small a carries little of H, and much of the left factor.
        """
        energies = kernels_for(self.target.samples).factor_energies()
        return min([self.n_eff, *(_effective_count(self.shares * one) for one in energies)])

    @cached_property
    def pairs(self) -> Tensor:
        """K_ij = sum_cd <G_ic, G_jd>^2, float64 [N, N].

        Raises:
            MemoryBudgetError: N x N numbers do not fit.
        """
        what = f"The {self.count} x {self.count} products of all pairs of examples"
        require_memory(24.0 * self.count**2, what, self.shares.device)
        return self.target.pair_products()

    @cached_property
    def copies(self) -> int:
        """Examples whose gradients, not zero, are those of an example before them.

        Raises:
            MemoryBudgetError: As for :attr:`pairs`.
        """
        squares = self.pairs.diagonal()
        same = self.pairs >= (1 - SAME) * torch.maximum(squares[:, None], squares)
        return int((same.tril(-1).any(dim=1) & (squares > 0)).sum())

    @cached_property
    def pair_forms(self) -> Tensor:
        """sum_{j != i} p_j K_ij, float64 [N]."""
        return self.pairs @ self.shares - self.pairs.diagonal() * self.shares

    @cached_property
    def target_squares(self) -> Tensor:
        """|H|^2 over distinct pairs, of all examples and without each, float64 [1 + N]."""
        return pair_statistic(self.shares * self.pair_forms, self.pair_totals)

    @cached_property
    def pair_totals(self) -> Tensor:
        """sum_{i != j} p_i p_j, of all examples and without each, float64 [1 + N]."""
        first, second, _ = self._power_sums
        return first.square() - second

    @cached_property
    def triple_totals(self) -> Tensor:
        """sum of p_i p_j p_k over distinct i, j, k, of all examples and without each."""
        first, second, third = self._power_sums
        return first**3 - 3 * first * second + 2 * third

    @cached_property
    def totals(self) -> Tensor:
        """sum_i p_i, of all examples and without each, float64 [1 + N]."""
        return self._power_sums[0]

    @cached_property
    def _power_sums(self) -> tuple[Tensor, Tensor, Tensor]:
        p = self.shares
        first, second, third = (leave_one_out((p**k).sum(), p**k) for k in (1, 2, 3))
        return first, second, third

    @cached_property
    def order(self) -> Tensor:
        """A fixed random order of the examples."""
        generator = torch.Generator().manual_seed(GROUPING_SEED)
        return torch.randperm(self.count, generator=generator).to(self.shares.device)

    def groups(self, count: int) -> list[Tensor]:
        """The examples in ``count`` groups of equal size, but for one example."""
        return [self.order[k::count].sort().values for k in range(count)]

    def without(self, group: Tensor) -> Tensor:
        """The examples outside of a group."""
        kept = torch.ones(self.count, dtype=torch.bool, device=self.shares.device)
        kept[group] = False
        return kept.nonzero()[:, 0]

    def subset_square(self, index: Tensor) -> float:
        """|H|^2 over distinct pairs of some of the examples."""
        p = self.shares[index]
        block = principal(self.pairs, index)
        total = p @ (block @ p) - p.square() @ block.diagonal()
        return float(total / (p.sum() ** 2 - p.square().sum()))


def _effective_count(sizes: Tensor) -> float:
    """(sum s)^2 / sum s^2; 0 where all are 0."""
    top = sizes.max()
    if not float(top) > 0:
        return 0.0
    sizes = sizes / top  # squares of tiny gradients would underflow
    return float(sizes.sum() ** 2 / sizes.square().sum())


def pair_statistic(rows: Tensor, totals: Tensor) -> Tensor:
    """sum_{i != j} p_i p_j f_ij / sum_{i != j} p_i p_j, of all examples and without each.

    Args:
        rows: p_i sum_{j != i} p_j f_ij of a symmetric f, float64 [N] or [N, k].
        totals: Of :attr:`Examples.pair_totals`.
    """
    sums = leave_one_out(rows.sum(dim=0), 2 * rows)
    return sums / (totals if rows.ndim == 1 else totals[:, None])


def forms_of_groups(values: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Sums over the examples of each group, [g, ...] of [N, ...]."""
    return torch.stack([values[group].sum(dim=0) for group in groups])
