"""What a kind of preconditioner does for a stack of equal blocks, and what all kinds share."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.linalg.memory import available_bytes
from kronecker_probe.linalg.precision import state_dtype
from kronecker_probe.operators.base import Operator
from kronecker_probe.optim.blocks.scratch import Scratch
from kronecker_probe.optim.layers.samples import LayerSamples
from kronecker_probe.optim.options.sections import (
    Basis,
    Inverse,
    Magnitude,
    Shapes,
    Spectrum,
    Statistics,
    Storage,
)

State = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """The choices of a parameter group."""

    statistics: Statistics
    basis: Basis
    spectrum: Spectrum
    inverse: Inverse
    magnitude: Magnitude
    shapes: Shapes
    storage: Storage
    betas: tuple[float, float]
    nesterov: bool = False

    @property
    def beta1(self) -> float:
        """Decay of the gradient's average."""
        return self.betas[0]

    @property
    def beta2(self) -> float | None:
        """Decay of second moments; None for a sum."""
        return None if self.statistics.accumulate == "sum" else self.betas[1]

    def state_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the state of a parameter of this dtype."""
        inverse_free = self.spectrum.eigenvalues == "inverse-free"
        if inverse_free and self.inverse.precision == "bfloat16":
            return torch.bfloat16
        return state_dtype(dtype)

    def weights(self, steps: int = 1) -> tuple[float, float]:
        """What an update keeps of second moments, and the weight of what is new.

        Args:
            steps: Since the last update.
        """
        if self.beta2 is None:
            return 1.0, float(self.statistics.batch_size)
        kept = self.beta2**steps
        return kept, (1.0 - kept) * self.statistics.batch_size

    def correction(self, steps: int) -> float:
        """What second moments that hold so many steps are divided by."""
        if self.beta2 is None or not self.statistics.bias_correction:
            return 1.0
        return 1.0 - self.beta2**steps


@dataclass(frozen=True)
class Failure:
    """A factor that was not refreshed.

    Attributes:
        block: Which of those given.
        side: Which dimension.
        what: What was not found.
    """

    block: int
    side: int
    what: str


class Preconditioner(abc.ABC):
    """Equal blocks [K, *block], whose state is a dict of tensors with K first.

    Args:
        recipe: The choices.
        block: Shape of a block.
        sides: Its dimensions that have a factor.

    Attributes:
        layers: What was recorded of the layers of the blocks of this step, for
            statistics.rule="kfac".
        scratch: Memory for intermediate results.
    """

    layers: Sequence[LayerSamples] = ()

    def __init__(self, recipe: Recipe, block: tuple[int, ...], sides: tuple[int, ...]) -> None:
        self.recipe = recipe
        self.block = block
        self.sides = sides
        self.scratch = Scratch()

    @abc.abstractmethod
    def initial(self, like: Tensor) -> State:
        """The state of ``like`` [K, *block], before the first step."""

    @abc.abstractmethod
    def update(self, state: State, gradients: Tensor, step: int) -> None:
        """Take in the gradients [K, *block] of a step, counted from 1."""

    def refresh(self, state: State, step: int) -> list[Failure]:
        """Renew what is due; what fails is kept as it was, and told."""
        return []

    @abc.abstractmethod
    def direction(self, state: State, gradients: Tensor, step: int) -> Tensor:
        """P^-power M of the averaged gradients, a new tensor [K, *block].

        The bias correction of M is not in it, but in the rate.
        """

    def filtered(self, state: State, gradients: Tensor, step: int) -> Tensor:
        """M [K, *block], the running average that this step's direction is of."""
        return state.get("momentum", gradients)

    def ready(self, state: State, step: int) -> Tensor | bool:
        """Whether the blocks have a preconditioner: all, none, or which of them, [K]."""
        return True

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
        return state["momentum"].lerp_(gradients, 1 - self.recipe.beta1)

    def with_momentum(self, state: State, like: Tensor) -> State:
        """``state`` with an average of the gradients, if there is one."""
        if self.recipe.beta1 > 0:
            state["momentum"] = torch.zeros_like(like)
        return state

    def updates(self, step: int) -> int:
        """Updates of the statistics in so many steps: the first step has one."""
        return (step - 1) // self.recipe.statistics.every + 1

    def updates_now(self, step: int) -> bool:
        """Whether this step updates the statistics."""
        return (step - 1) % self.recipe.statistics.every == 0

    def correction(self, step: int) -> float:
        """What the statistics are divided by."""
        return self.recipe.correction(self.recipe.statistics.every * self.updates(step))

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
