"""A second moment of every entry: Adam, RMSprop and AdaGrad, with or without the root."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from kronecker_probe.operators.structures.diagonal import DiagonalOperator
from kronecker_probe.optim.blocks.contractions import per_block
from kronecker_probe.optim.blocks.scratch import Scratch
from kronecker_probe.optim.options.kinds import DiagonalOptions, Epsilon
from kronecker_probe.optim.preconditioners.base import Preconditioner, State


@final
class Diagonal(Preconditioner[DiagonalOptions]):
    """M / (sqrt(v) + epsilon), or M / (v + epsilon) without the root."""

    def initial(self, like: Tensor) -> State:
        moment = torch.full_like(like, self.options.moments.initial)
        return self.with_momentum({"second_moment": moment}, like)

    def update(self, state: State, gradients: Tensor, step: int) -> None:
        moments = self.options.moments
        if moments.update_at(step) is not None:
            keep, weight = moments.weights(moments.every)
            state["second_moment"].mul_(keep).addcmul_(gradients, gradients, value=weight)

    def direction(self, state: State, gradients: Tensor, step: int) -> Tensor:
        average = self.average(state, gradients)
        return divided(
            average,
            self._denominator(state["second_moment"], step),
            damped=self.options.epsilon.surely_damps,
        )

    def _denominator(self, moment: Tensor, step: int) -> Tensor:
        one = self.options
        return damped_power(moment, one.moments.correction_at(step), one.power, one.epsilon)

    @property
    def first(self) -> int:
        return self.options.first

    @property
    def rule(self) -> str:
        return "diagonal"

    def operator(self, state: State, block: int, step: int) -> DiagonalOperator:
        moment = state["second_moment"][block : block + 1].double()
        values = self._denominator(moment, step)[0].pow_(1 / self.options.power)
        return DiagonalOperator(values.reshape(values.shape[0], -1))


def damped_power(
    moment: Tensor,
    correction: float,
    power: float,
    epsilon: Epsilon,
    scratch: Scratch | None = None,
) -> Tensor:
    """(v / b)^power + epsilon of blocks [K, ...]; a new tensor, or in ``scratch``."""
    if power == 0.5:
        out = None if scratch is None else scratch.take("denominator", moment.shape, moment)
        root = torch.sqrt(moment, out=out).div_(math.sqrt(correction))
    else:
        root = (moment / correction).pow_(power)
    if not epsilon.relative:
        return root.add_(epsilon.value)
    largest = per_block(root.flatten(1).amax(1), root)
    return root.add_(epsilon.value * largest)


def divided(average: Tensor, denominator: Tensor, *, damped: bool) -> Tensor:
    """M / denominator in the place of the denominator; 0 where that is 0, never 0/0.

    Args:
        average: M.
        denominator: At least 0, of its shape.
        damped: Whether it is positive everywhere.
    """
    if not damped:
        denominator.masked_fill_(denominator == 0, math.inf)
    return torch.div(average, denominator, out=denominator)
