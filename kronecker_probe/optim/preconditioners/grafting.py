"""The length of the step, borrowed from another method (grafting), block by block."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from kronecker_probe.optim.blocks.scratch import Scratch
from kronecker_probe.optim.options.kinds import GraftOptions
from kronecker_probe.optim.preconditioners.base import State
from kronecker_probe.optim.preconditioners.diagonal import divided

# A direction shorter than this is not stretched further (Distributed Shampoo adds the same).
_SHORTEST = 1e-16


@final
class Graft:
    """The direction of the grafted method on a stack of blocks, of which the norm is used.

    Args:
        options: Which method.
        scratch: Memory for its direction.
    """

    def __init__(self, options: GraftOptions, scratch: Scratch) -> None:
        self.options = options
        self.scratch = scratch

    def update(self, state: State, gradients: Tensor) -> None:
        """v <- beta2 v + (1 - beta2) G o G, or v + G o G."""
        if not self.options.has_moment:
            return
        beta2 = self.options.beta2
        keep, weight = (1.0, 1.0) if beta2 is None else (beta2, 1.0 - beta2)
        state["graft_moment"].mul_(keep).addcmul_(gradients, gradients, value=weight)

    def direction(self, state: State, filtered: Tensor, step: int) -> Tensor:
        """Its own direction of M, which takes over where there is no preconditioner yet.

        It lies in the scratch memory, or is M itself.
        """
        if not self.options.has_moment:
            return filtered
        moment = state["graft_moment"]
        denominator = torch.sqrt(moment, out=self.scratch.take("graft", moment.shape, moment))
        beta2, epsilon = self.options.beta2, self.options.epsilon
        if self.options.bias_correction and beta2 is not None:
            denominator.div_(math.sqrt(1.0 - beta2**step))
        return divided(filtered, denominator.add_(epsilon), damped=epsilon > 0)

    def scaled(self, direction: Tensor, graft: Tensor) -> Tensor:
        """``direction`` with the Frobenius norms of ``graft``, block by block, in place."""
        if self.options.method == "none":
            return direction
        dims = tuple(range(1, direction.ndim))
        length = torch.linalg.vector_norm(direction, dim=dims, keepdim=True).clamp_min_(_SHORTEST)
        wanted = torch.linalg.vector_norm(graft, dim=dims, keepdim=True)
        return direction.mul_(wanted.div_(length))
