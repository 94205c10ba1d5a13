"""The length of the step, borrowed from another method (grafting)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A direction shorter than this is not stretched further (Distributed Shampoo adds the same).
_SHORTEST = 1e-16


def adam_denominator(second_moment: Tensor, correction: float, epsilon: float) -> Tensor:
    """sqrt(v / b) + epsilon, a new tensor.

    Args:
        second_moment: v.
        correction: b, the bias correction of v.
        epsilon: At least 0.
    """
    return second_moment.sqrt().div_(math.sqrt(correction)).add_(epsilon)


def adam_direction(
    filtered: Tensor, second_moment: Tensor, correction: float, epsilon: float
) -> Tensor:
    """M / (sqrt(v / b) + epsilon), entrywise, as Adam has it.

    Args:
        filtered: M, the gradient or its average.
        second_moment: v, of the same shape.
        correction: b, the bias correction of v.
        epsilon: Where it is 0, entries with v = 0 give 0: the pseudo-inverse, never 0/0.

    Returns:
        A new tensor of the same shape.
    """
    denominator = adam_denominator(second_moment, correction, epsilon)
    if epsilon == 0:
        denominator.masked_fill_(denominator == 0, math.inf)
    return torch.div(filtered, denominator, out=denominator)


def graft_scale(direction: Tensor, graft: Tensor) -> Tensor:
    """The factor, a 0-dim tensor, that gives ``direction`` the Frobenius norm of ``graft``.

    Only the norm of the grafted method is used, never its direction (arXiv 2309.06497).
    """
    length: Tensor = torch.linalg.vector_norm(direction).clamp_min_(_SHORTEST)
    wanted: Tensor = torch.linalg.vector_norm(graft)
    return wanted.div_(length)
