"""What a kind of preconditioner does for a stack of equal blocks, and what all kinds share."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.linalg.memory import available_bytes
from kronecker_probe.operators.base import Operator
from kronecker_probe.optim.blocks.scratch import Scratch
from kronecker_probe.optim.layers.samples import LayerSamples
from kronecker_probe.optim.options.kinds import Kind

State = dict[str, Tensor]
OptionsT = TypeVar("OptionsT", bound=Kind)


@dataclass(frozen=True)
class Failure:
    """A factor that was not refreshed: of which of the blocks, on which side, and what failed."""

    block: int
    side: int
    what: str


class Preconditioner(abc.ABC, Generic[OptionsT]):
    """Equal blocks [K, *block], whose state is a dict of tensors with K first.

    Args:
        options: Of this kind.
        beta1: Decay of the gradient's average; 0 for none.
        block: Shape of a block.
        sides: Its dimensions that have a factor.
        scratch: Memory for intermediate results.

    Attributes:
        layers: What was recorded of the layers of the blocks of this step, for factors of inputs
            and output gradients.
    """

    layers: Sequence[LayerSamples] = ()

    def __init__(
        self,
        options: OptionsT,
        beta1: float,
        block: tuple[int, ...],
        sides: tuple[int, ...],
        scratch: Scratch,
    ) -> None:
        self.options = options
        self.beta1 = beta1
        self.block = block
        self.sides = sides
        self.scratch = scratch

    @abc.abstractmethod
    def initial(self, like: Tensor) -> State:
        """The state of ``like`` [K, *block], before the first step."""

    @abc.abstractmethod
    def update(self, state: State, gradients: Tensor, step: int) -> None:
        """Take in the gradients [K, *block] of a step, counted from 1."""

    def refresh(self, state: State, step: int) -> list[Failure]:
        """Renew what is due; what fails stays as it was, and is reported."""
        return []

    @abc.abstractmethod
    def direction(self, state: State, gradients: Tensor, step: int) -> Tensor:
        """P^-power M of the averaged gradients, a new tensor [K, *block].

        The bias correction of M is not in it, but in the rate.
        """

    def filtered(self, state: State, gradients: Tensor, step: int) -> Tensor:
        """M [K, *block], the running average that this step's direction is of."""
        return state.get("momentum", gradients)

    @property
    def first(self) -> int:
        """The first step with a preconditioner."""
        return 1

    def ready(self, state: State, step: int) -> Tensor | bool:
        """Whether the blocks have a preconditioner: all, none, or which of them, [K]."""
        return step >= self.first

    @property
    def rule(self) -> str | None:
        """The name for ``kp.approximate`` of what P is, fresh and undamped; None without one."""
        return None

    @abc.abstractmethod
    def operator(self, state: State, block: int, step: int) -> Operator:
        """P of one block, in float64, as an operator on its matrix.

        Raises:
            UnsupportedError: There is none yet, or it is not resolved; the message says why.
        """

    def average(self, state: State, gradients: Tensor) -> Tensor:
        """M <- beta1 M + (1 - beta1) G, and M."""
        if "momentum" not in state:
            return gradients
        return state["momentum"].lerp_(gradients, 1 - self.beta1)

    def with_momentum(self, state: State, like: Tensor) -> State:
        """``state`` with an average of the gradients, if there is one."""
        if self.beta1 > 0:
            state["momentum"] = torch.zeros_like(like)
        return state

    @property
    def missing(self) -> int:
        """Entries of a block over those of the sides that have a factor."""
        return math.prod(self.block) // math.prod(self.block[side] for side in self.sides)

    def product(self, state: State, factors: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """The factors [r, r] of all sides as left and right one, the identity where there is none.

        Raises:
            UnsupportedError: An identity, or a product, that is too large to be held.
        """
        device = next(t.device for t in state.values() if t.is_floating_point())
        left, *others = (
            factors[side].double() if side in factors else _identity(size, device)
            for side, size in enumerate(self.block)
        )
        right = left.new_ones(1, 1)
        for one in others:
            _check_memory(len(right) * len(one), device, "product of its factors")
            right = torch.kron(right, one)
        return left, right

    def each(self) -> Iterator[tuple[int, str]]:
        """The sides that have a factor, with the end of their names."""
        return ((side, str(side)) for side in self.sides)


def _identity(size: int, device: torch.device) -> Tensor:
    _check_memory(size, device, "factor of a dimension above shapes.max_dim, the identity")
    return torch.eye(size, dtype=torch.float64, device=device)


def _check_memory(size: int, device: torch.device, what: str) -> None:
    needed = 8 * size**2
    if needed > available_bytes(device) // 2:
        raise UnsupportedError(
            f"the {what}, is [{size}, {size}] and would take {needed / 1e9:.1f} GB. Raise "
            "shapes.max_dim or cut it by shapes.block_size, or do not measure it."
        )
