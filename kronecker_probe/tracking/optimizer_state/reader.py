"""An optimizer's state of one parameter, each entry checked as it is read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from kronecker_probe.errors import UnsupportedError


@dataclasses.dataclass(frozen=True)
class ParameterState:
    """The state of one parameter and the options of its group.

    Attributes:
        optimizer: The optimizer.
        parameter: Real and floating-point.
        group: Its parameter group.
        entries: Its state, which is not empty.
    """

    optimizer: Optimizer
    parameter: Tensor
    group: Mapping[str, Any]
    entries: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """The name of the optimizer's class."""
        return type(self.optimizer).__name__

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n): the first dimension and the product of all others."""
        shape = self.parameter.shape
        return shape[0] if shape else 1, math.prod(shape[1:])

    def steps(self) -> int:
        """How many steps were taken, at least 1.

        Raises:
            UnsupportedError: None yet, or the state has no such number.
        """
        # pytorch_optimizer counts in the group
        value = self.entries.get("step", self.group.get("step"))
        if value is None:
            raise UnsupportedError(f"{self.kind} holds no step count for this parameter")
        steps = float(value)
        if not (steps.is_integer() and steps >= 0):
            raise UnsupportedError(f"{self.kind} holds the step count {steps:g}")
        if steps == 0:
            raise UnsupportedError(f"{self.kind} has taken no step with this parameter yet")
        return int(steps)

    def tensor(self, key: str) -> Tensor:
        """A state tensor of the shape of the parameter, without its history.

        Raises:
            UnsupportedError: It is missing, of another shape, sharded or quantized, or not finite.
        """
        if key not in self.entries:
            raise UnsupportedError(f'{self.kind} holds no "{key}" for this parameter')
        return self.checked(f'"{key}"', self.entries[key], tuple(self.parameter.shape))

    def checked(self, what: str, value: object, shape: tuple[int, ...]) -> Tensor:
        """``value`` if it is a plain, real and finite tensor of this shape.

        Raises:
            UnsupportedError: It is not.
        """
        # A subclass is a shard or quantized: its numbers are not those of the whole tensor.
        if not isinstance(value, Tensor) or type(value) not in (Tensor, nn.Parameter):
            raise UnsupportedError(
                f"the {what} that {self.kind} holds is a {type(value).__name__}, not a plain tensor"
            )
        if tuple(value.shape) != shape:
            raise UnsupportedError(
                f"the {what} that {self.kind} holds is {list(value.shape)}, where "
                f"{list(shape)} was expected"
            )
        if not value.is_floating_point():
            raise UnsupportedError(f"the {what} that {self.kind} holds is of {value.dtype}")
        if not value.isfinite().all():
            raise UnsupportedError(
                f"the {what} that {self.kind} holds has a NaN or an infinity; look for the step "
                "where it came in"
            )
        return value.detach()

    def option(self, key: str) -> Any:
        """An option of the parameter's group.

        Raises:
            UnsupportedError: There is none of this name.
        """
        if key not in self.group:
            raise UnsupportedError(f"the parameter group of {self.kind} has no option {key!r}")
        return self.group[key]

    def bias_correction(self, steps: int) -> float:
        """1 - beta2^t after t ``steps``."""
        return float(1.0 - float(self.option("betas")[1]) ** steps)

    def squared(self, denominator: Tensor) -> Tensor:
        """The diagonal of P, float64: the square of what the step divides by.

        Raises:
            UnsupportedError: The step divides by zero, or by what is not finite.
        """
        if not denominator.isfinite().all():
            raise UnsupportedError(
                f"what {self.kind} divides by is not finite in {denominator.dtype}; look for a "
                "second moment that overflowed or is negative"
            )
        null = int((denominator == 0).sum())
        if null:
            raise UnsupportedError(
                f"{self.kind} divides by zero in {null} of {denominator.numel()} entries "
                f"({denominator.dtype}, eps={float(self.option('eps')):g}); raise eps"
            )
        return denominator.double().square()


def parameter_state(optimizer: Optimizer, parameter: Tensor) -> ParameterState:
    """The state and group of a parameter.

    Raises:
        UnsupportedError: It is none of the optimizer's, has no state yet, or is not real and
            floating-point.
    """
    kind = type(optimizer).__name__
    if not parameter.is_floating_point():
        raise UnsupportedError(f"a parameter of {parameter.dtype}; it must be real floating-point")
    for group in optimizer.param_groups:
        if any(parameter is other for other in group["params"]):
            state = optimizer.state.get(parameter)
            if not state:
                raise UnsupportedError(f"{kind} holds no state for this parameter yet")
            return ParameterState(optimizer, parameter, group, state)
    raise UnsupportedError(
        f"a tensor of shape {list(parameter.shape)} is not a parameter of this {kind}"
    )
