"""Inverse-free Shampoo: inverse factors that are updated themselves (arXiv 2402.03496)."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.structures.diagonal import DiagonalOperator
from kronecker_probe.operators.structures.kronecker import KroneckerOperator
from kronecker_probe.optim.blocks.contractions import along, contract, per_block, unfold
from kronecker_probe.optim.blocks.rounding import store
from kronecker_probe.optim.options.kinds import InverseFreeOptions
from kronecker_probe.optim.preconditioners.base import Preconditioner, State

# Entries of inverse factors: with four of them a direction stays within the range of float32.
_LARGEST = 2.0**25


@final
class InverseFree(Preconditioner[InverseFreeOptions]):
    """(C C^T) G (K K^T) with C and K updated by matrix products alone: no inverse, no root.

    Per factor K_i of dimension d_i, i = 1 ... N, every ``statistics.every`` steps::

        m_i <- a m_i + (1 - a)/2 [ B / prod_{j != i} d_j  K_i^T S_i K_i
                                   + damping prod_{j != i} (Tr K_j^T K_j / d_j) K_i^T K_i - I ]
        K_i <- K_i - lr_factor / max(1, |m_i|) K_i m_i

    with S_i the outer product of G along dimension i, whitened by the K_j of the others. Its
    stationary point is the KL-optimal product of H + damping I, of which (K_i K_i^T)^-1 are the
    factors. Diagonal factors keep the diagonals of all that.
    """

    def initial(self, like: Tensor) -> State:
        state: State = {}
        for side, end in self.each():
            size = self.block[side]
            shape = (size,) if self.options.diagonal else (size, size)
            start = torch.ones(size) if self.options.diagonal else torch.eye(size)
            held = start.to(like).repeat(len(like), *[1] * len(shape))
            state[f"inverse_{end}"] = held
            state[f"velocity_{end}"] = torch.zeros_like(held)
        return self.with_momentum(state, like)

    def update(self, state: State, gradients: Tensor, step: int) -> None:
        rule, update = self.options, self.options.update_at(step)
        if update is None:
            return
        whitened = gradients
        for side in self.sides:
            whitened = self._times(state, whitened, side)
        sizes = {side: self._mean_square(state[f"inverse_{side}"]) for side in self.sides}
        entries = math.prod(self.block)
        found = {}
        for side, end in self.each():
            others = [sizes[other] for other in self.sides if other != side]
            damping = rule.damping * math.prod(others, start=torch.ones_like(sizes[side]))
            scale = rule.batch_size * self.block[side] / entries
            rows = unfold(whitened, side)
            found[end] = self._velocity(state[f"inverse_{end}"], rows, scale, damping)
        for end, new in found.items():  # all from the factors before the step
            velocity = state[f"velocity_{end}"]
            sound = new.flatten(1).isfinite().all(1)  # the product of huge numbers may overflow
            new = torch.where(per_block(sound, new), new, velocity)
            velocity.lerp_(new, 1 - rule.decay)
            self._move(state[f"inverse_{end}"], velocity, update)

    def _velocity(self, inverse: Tensor, rows: Tensor, scale: float, damping: Tensor) -> Tensor:
        """Half of [scale X X^T + damping K^T K - I], X the whitened gradient along one side."""
        if self.options.diagonal:
            outer = rows.square().sum(2) * scale
            return 0.5 * (outer + damping[:, None] * inverse.square() - 1.0)
        outer = torch.bmm(rows, rows.mT) * scale
        outer = outer + damping[:, None, None] * torch.bmm(inverse.mT, inverse)
        outer.diagonal(dim1=1, dim2=2).sub_(1.0)
        return 0.5 * outer

    def _move(self, inverse: Tensor, velocity: Tensor, update: int) -> None:
        rate = self.options.lr
        dims = (1,) if self.options.diagonal else (1, 2)
        size = torch.linalg.vector_norm(velocity, dim=dims, keepdim=True).clamp_min(1.0)
        step = velocity * (rate / size)
        change = inverse * step if self.options.diagonal else torch.bmm(inverse, step)
        # without damping, an input that never fires makes its inverse grow for ever
        largest = inverse.flatten(1).abs().amax(1)
        change *= per_block(largest < _LARGEST, change)
        if inverse.dtype == torch.bfloat16:  # where a change is less than a rounding
            store(inverse.float() - change, inverse, update)
        else:
            inverse.sub_(change)

    def _times(self, state: State, blocks: Tensor, side: int) -> Tensor:
        """K^T along one dimension."""
        inverse = state[f"inverse_{side}"]
        if self.options.diagonal:
            return blocks * along(inverse, side, blocks)
        return contract(blocks, inverse.mT, side)

    def _mean_square(self, inverse: Tensor) -> Tensor:
        """Tr(K^T K) / d."""
        return inverse.square().flatten(1).sum(1) / inverse.shape[1]

    def direction(self, state: State, gradients: Tensor, step: int) -> Tensor:
        direction = self.average(state, gradients)
        for side, end in self.each():
            direction = self._times(state, direction, side)
            inverse = state[f"inverse_{end}"]
            if self.options.diagonal:
                direction = self._times(state, direction, side)
            else:
                direction = contract(direction, inverse, side)
        return direction.clone() if direction is gradients else direction

    def operator(self, state: State, block: int, step: int) -> Operator:
        held = {side: state[f"inverse_{side}"][block].double() for side in self.sides}
        if self.options.diagonal:
            powers = {side: one.square().reciprocal().diag() for side, one in held.items()}
        else:
            powers = {side: torch.linalg.inv(one @ one.mT) for side, one in held.items()}
        left, right = self.product(state, powers)
        if self.options.diagonal:
            return DiagonalOperator(torch.outer(left.diagonal(), right.diagonal()))
        return KroneckerOperator(left, right)
