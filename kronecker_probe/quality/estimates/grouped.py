"""Incomplete U-statistics over groups of examples: any layer, shared positions included.

With the examples in g groups, <H_A, L_B kron R_C> summed over *distinct* groups A, B, C leaves out
some triples of distinct examples (for g = 16, 18 % of them) and holds no example twice, so it is
unbiased like the complete statistic. It takes g half steps, where that takes N^2 of them: the
half step of every group with each R_C, <E_A[G R_C G^T], L_B>. What a group adds in its three roles
gives all values without one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from kronecker_probe.approximations import approximate
from kronecker_probe.linalg.memory import require_memory
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.operators.structures.kronecker import KroneckerOperator
from kronecker_probe.quality.estimates.examples import Examples, forms_of_groups
from kronecker_probe.quality.estimates.replicates import Replicates

# Groups of the incomplete statistics; with fewer examples, each is a group of its own.
GROUPS = 16


@dataclass(frozen=True)
class _Means:
    """Sums over each group's examples, with their shares, whose totals are L, R and a scale.

    Attributes:
        left: [g, m, m].
        right: [g, n, n].
        scale: [g], the divisor of L kron R; None for 1.
    """

    left: Tensor
    right: Tensor
    scale: Tensor | None


@final
class Grouped:
    """Group statistics of one target.

    Args:
        examples: The examples of the target that the numbers are for.
        target: That target, or a block of it, with the same examples.
    """

    def __init__(self, examples: Examples, target: SecondMoment) -> None:
        self._examples = examples
        self._target = target
        self._groups = examples.groups(min(GROUPS, examples.count))
        self._shares = forms_of_groups(examples.shares, self._groups)

    @cached_property
    def _target_squares(self) -> Tensor:
        """|H|^2 over distinct examples, of all groups and without each, [1 + g]."""
        p = self._examples.shares
        member = torch.zeros(len(p), len(self._groups), dtype=p.dtype, device=p.device)
        for k, group in enumerate(self._groups):
            member[group, k] = p[group]
        within = forms_of_groups(p.square(), self._groups).diag()
        squares = forms_of_groups(p.square() * self._examples.pairs.diagonal(), self._groups).diag()
        sums = member.T @ self._examples.pairs @ member - squares
        return _without_each(sums) / _without_each(torch.outer(*[self._shares] * 2) - within)

    def product(self, name: str) -> Replicates:
        """The replicates of "shampoo-squared", "kfac", "kfac-reduce" or "tkfac".

        Raises:
            MemoryBudgetError: The factors of all groups do not fit.
            UnsupportedError: The samples lack what it needs.
        """
        self._check_memory()
        means = self._shampoo() if name == "shampoo-squared" else self._by_name(name)
        scale = torch.ones_like(self._shares) if means.scale is None else means.scale
        total = torch.cat([scale.sum()[None], scale.sum() - scale])
        kept = torch.cat([self._shares.sum()[None], self._shares.sum() - self._shares])
        divisor = total / kept if means.scale is not None else torch.ones_like(total)
        lefts, rights = self._pair_square(means.left), self._pair_square(means.right)
        cross = self._triples(means) / divisor
        return Replicates(cross, self._target_squares, lefts * rights / divisor**2, single=False)

    def one_sided(self, side: int) -> Replicates:
        """L kron I / n (side 0), or I / m kron R."""
        self._check_memory()
        factors = self._half_steps(side)
        square = self._pair_square(factors / self._examples.scale) / self._target.shape[1 - side]
        return Replicates(square, self._target_squares, square, single=False)

    def _check_memory(self) -> None:
        m, n = self._target.shape
        needed = 8.0 * len(self._groups) * (3 * m * m + n * n)
        what = f"The factors of {len(self._groups)} groups of examples of a {m} x {n} layer"
        require_memory(needed, what, self._shares.device)

    def _half_steps(self, side: int) -> Tensor:
        """E[G G^T] or E[G^T G] of each group, [g, k, k]."""
        steps = self._target.grouped_step(side, None, self._groups)
        return torch.stack([factor.matrix for factor in steps])

    def _shampoo(self) -> _Means:
        scale = self._examples.scale
        left, right = (self._half_steps(side) / scale for side in (0, 1))
        return _Means(left, right, left.diagonal(dim1=1, dim2=2).sum(dim=1))

    def _by_name(self, name: str) -> _Means:
        """Those of each group by itself, as the approximation of that name finds them."""
        left, right, scales = [], [], []
        for group, share in zip(self._groups, self._shares, strict=True):
            part = approximate(SecondMoment(self._target.samples.subset(group)), name)
            assert isinstance(part, KroneckerOperator)
            left.append(part.left / self._examples.scale)
            scaled = name == "tkfac"  # its factors are sums, the others' right one is a mean
            right.append(part.right / self._examples.scale if scaled else part.right * share)
            scales.append(1.0 / (part.scale * self._examples.scale) if part.scale > 0 else 0.0)
        scale = self._shares.new_tensor(scales) if name == "tkfac" else None
        return _Means(torch.stack(left), torch.stack(right), scale)

    def _pair_square(self, factors: Tensor) -> Tensor:
        """|sum of factors|^2 over distinct groups, [1 + g]."""
        flat = factors.flatten(1)
        sums = _without_each(_zero_diagonal(flat @ flat.T))
        return sums / _without_each(_zero_diagonal(torch.outer(self._shares, self._shares)))

    def _triples(self, means: _Means) -> Tensor:
        """<H, L kron R> over distinct groups, of all groups and without each, [1 + g]."""
        forms = self._target.grouped_forms(means.left, means.right, self._groups)
        sums = forms.permute(2, 0, 1) / self._examples.scale  # by the group of R, of H, of L
        shares = self._shares
        triples = shares[:, None, None] * shares[:, None] * shares
        return _distinct_sums(sums) / _distinct_sums(triples)


def _zero_diagonal(matrix: Tensor) -> Tensor:
    return matrix - matrix.diagonal().diag()


def _without_each(sums: Tensor) -> Tensor:
    """The sum of a symmetric [g, g] and the sums without row and column k, [1 + g]."""
    whole = sums.sum()
    return torch.cat([whole[None], whole - 2 * sums.sum(dim=1) + sums.diagonal()])


def _distinct_sums(sums: Tensor) -> Tensor:
    """Sum of [g, g, g] over distinct indices, of all and without each index, [1 + g]."""
    count = len(sums)
    index = torch.arange(count, device=sums.device)
    one, two, three = index[:, None, None], index[:, None], index
    kept = torch.where((one != two) & (two != three) & (one != three), sums, 0.0)
    whole = kept.sum()
    roles = kept.sum(dim=(1, 2)) + kept.sum(dim=(0, 2)) + kept.sum(dim=(0, 1))
    return torch.cat([whole[None], whole - roles])
