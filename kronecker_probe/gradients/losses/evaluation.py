"""Calling the user's loss: values and gradients in the outputs, at least in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from kronecker_probe.errors import UnsupportedError

LossFunction = Callable[[Tensor, Tensor], Tensor]

# Roundings of a gradient entry that a loss's own order of summation may cost.
ROUNDINGS = 128
# More than this is no longer a check; only losses that insist on half precision come near.
COARSEST = 0.03


@final
@dataclass(frozen=True)
class Evaluator:
    """A loss, and how it is called.

    Attributes:
        loss_fn: Takes (outputs, targets), returns a scalar.
        dtype: Of the outputs that it is given.
        autocast: Whether the caller's autocast is left on around the call.
    """

    loss_fn: LossFunction
    dtype: torch.dtype
    autocast: bool

    @property
    def tolerance(self) -> float:
        """Relative error of a gradient that rounding explains."""
        return min(ROUNDINGS * torch.finfo(self.dtype).eps, COARSEST)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss, a scalar; the graph reaches ``outputs`` where these need a gradient.

        The loss gets copies, because it may write into what it is given.

        Raises:
            UnsupportedError: It returns no scalar tensor.
        """
        with self._precision(outputs.device.type):
            return scalar(self.loss_fn(outputs.to(self.dtype, copy=True), targets.clone()))

    def _precision(self, device_type: str) -> AbstractContextManager[object]:
        if self.autocast or not torch.is_autocast_enabled(device_type):
            return nullcontext()
        return torch.autocast(device_type, enabled=False)

    def value_and_gradient(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its gradient in the outputs, of their shape and dtype, at least float32.

        Raises:
            UnsupportedError: The loss has no gradient in the outputs, or one in other tensors.
        """
        leaf = at_least_float32(outputs).requires_grad_(True)
        with torch.enable_grad():
            value = self.value(leaf, targets)
        _check_leaves(value, leaf)
        return value.detach(), derivative(value, leaf)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss's gradient in the outputs, of their shape, at least float32."""
        return self.value_and_gradient(outputs, targets)[1]

    def rounded(self, outputs: Tensor) -> Tensor:
        """The outputs as the loss sees them."""
        return outputs.to(self.dtype).to(outputs.dtype)


def evaluators(loss_fn: LossFunction, outputs: Tensor) -> list[Evaluator]:
    """Ways to call a loss, best first.

    Low precision, of the outputs or by autocast, costs the gradients their accuracy; but a loss
    may hold weights in low precision and take no other.
    """
    wide = at_least_float32(outputs).dtype
    ways = [Evaluator(loss_fn, wide, autocast=False)]
    if wide != outputs.dtype or torch.is_autocast_enabled(outputs.device.type):
        ways.append(Evaluator(loss_fn, outputs.dtype, autocast=True))
    return ways


def in_float64(evaluator: Evaluator) -> Evaluator:
    """The same loss on outputs in float64, unless it takes low precision only."""
    return evaluator if evaluator.autocast else replace(evaluator, dtype=torch.float64)


def at_least_float32(outputs: Tensor) -> Tensor:
    """The outputs without their graph, as float32 or float64."""
    detached = outputs.detach()
    return detached if detached.dtype == torch.float64 else detached.float()


def scalar(value: object) -> Tensor:
    """What a loss returned, as a tensor without dimensions.

    Raises:
        UnsupportedError: It is no tensor of one element.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise UnsupportedError(
        f"loss_fn(outputs, targets) returned {got}; it must return a scalar tensor, the mean or "
        "sum over examples (not reduction='none')."
    )


def derivative(value: Tensor, leaf: Tensor, create_graph: bool = False) -> Tensor:
    """The gradient of ``value`` in ``leaf``.

    Raises:
        UnsupportedError: ``value`` does not depend on ``leaf``.
    """
    if value.requires_grad:
        found = torch.autograd.grad(value, leaf, create_graph=create_graph, allow_unused=True)[0]
        if found is not None:
            return found
    raise UnsupportedError(
        "loss_fn(outputs, targets) has no gradient in outputs: it does not depend on them, or "
        "detaches them."
    )


def _check_leaves(value: Tensor, outputs: Tensor) -> None:
    others = []
    seen = set()
    stack = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and leaf is not outputs:
            others.append(leaf)
        stack += [following for following, _ in node.next_functions]
    if others:
        shapes = ", ".join(str(list(leaf.shape)) for leaf in others[:5])
        raise UnsupportedError(
            f"loss_fn depends on {len(others)} tensors besides the outputs that require a gradient "
            f"(of shapes {shapes}): a penalty on parameters, or a loss with parameters of its own; "
            "pass the data term alone, with such tensors detached."
        )
