"""The length of the step, borrowed from another method (grafting), block by block."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from kronecker_probe.optim.blocks.scratch import Scratch
from kronecker_probe.optim.preconditioners.base import Recipe, State
from kronecker_probe.optim.preconditioners.diagonal import divided

# A direction shorter than this is not stretched further (Distributed Shampoo adds the same).
_SHORTEST = 1e-16


@final
class Graft:
    """The direction of the grafted method on a stack of blocks, of which the norm is used.

    Args:
        recipe: Which method, with the beta2 and the bias correction of the statistics unless it
            has its own.
        scratch: Memory for its direction.
    """

    def __init__(self, recipe: Recipe, scratch: Scratch) -> None:
        self.scratch = scratch
        magnitude = recipe.magnitude
        self.kind = magnitude.grafting
        self.epsilon = magnitude.epsilon
        beta2 = recipe.betas[1] if magnitude.beta2 is None else magnitude.beta2
        self.beta2 = None if self.kind == "adagrad" else beta2
        self.corrects = self.kind == "adam" and recipe.statistics.bias_correction

    @property
    def has_moment(self) -> bool:
        """Whether it keeps a second moment of its own."""
        return self.kind in ("adagrad", "rmsprop", "adam")

    def update(self, state: State, gradients: Tensor) -> None:
        """v <- beta2 v + (1 - beta2) G o G, or v + G o G."""
        if not self.has_moment:
            return
        keep, weight = (1.0, 1.0) if self.beta2 is None else (self.beta2, 1.0 - self.beta2)
        state["graft_moment"].mul_(keep).addcmul_(gradients, gradients, value=weight)

    def direction(self, state: State, filtered: Tensor, step: int) -> Tensor:
        """Its own direction of M, which takes over where there is no preconditioner yet.

        It lies in the scratch memory, or is M itself.
        """
        if not self.has_moment:
            return filtered
        moment = state["graft_moment"]
        denominator = torch.sqrt(moment, out=self.scratch.take("graft", moment.shape, moment))
        if self.corrects and self.beta2 is not None:
            denominator.div_(math.sqrt(1.0 - self.beta2**step))
        return divided(filtered, denominator.add_(self.epsilon), damped=self.epsilon > 0)

    def scaled(self, direction: Tensor, graft: Tensor) -> Tensor:
        """``direction`` with the Frobenius norms of ``graft``, block by block, in place."""
        if self.kind == "none":
            return direction
        dims = tuple(range(1, direction.ndim))
        length = torch.linalg.vector_norm(direction, dim=dims, keepdim=True).clamp_min_(_SHORTEST)
        wanted = torch.linalg.vector_norm(graft, dim=dims, keepdim=True)
        return direction.mul_(wanted.div_(length))
