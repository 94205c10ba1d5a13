"""One rule a module kind: how a layer's parameter gradient factors into inputs and outputs."""

from __future__ import annotations

import abc
from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor, nn


class LayerRule(abc.ABC):
    """How G_i = sum_t d_it a_it^T reads off one call of a module."""

    module: ClassVar[type[nn.Module]]

    @abc.abstractmethod
    def refusal(self, module: nn.Module) -> str:
        """Why this module's weight cannot be measured; empty when it can."""

    @abc.abstractmethod
    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """a, [N, T, n], from the module's input with N first."""

    @abc.abstractmethod
    def output_grads(self, grad: Tensor) -> Tensor:
        """d, [N, T, m], from the gradient of the module's output with N first."""

    @abc.abstractmethod
    def batch_problem(self, module: nn.Module, x: Tensor, n_data: int) -> str:
        """Why the input ``x`` has no batch dimension of ``n_data`` in front; empty if it has."""


@final
class LinearRule(LayerRule):
    """nn.Linear on [N, ..., n]: all middle dimensions are shared positions."""

    module = nn.Linear

    def refusal(self, module: nn.Module) -> str:
        return ""

    def batch_problem(self, module: nn.Module, x: Tensor, n_data: int) -> str:
        return "" if x.ndim >= 2 and x.shape[0] == n_data else _not_batch_first(x, n_data)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def output_grads(self, grad: Tensor) -> Tensor:
        return grad.reshape(grad.shape[0], -1, grad.shape[-1])


@final
class Conv2dRule(LayerRule):
    """nn.Conv2d, unfolded: output pixels are shared positions, n = in k k."""

    module = nn.Conv2d

    def refusal(self, module: nn.Module) -> str:
        assert isinstance(module, nn.Conv2d)
        if module.groups != 1:
            return f"Conv2d with groups={module.groups} is not supported (only groups=1)"
        return ""

    def batch_problem(self, module: nn.Module, x: Tensor, n_data: int) -> str:
        return "" if x.ndim == 4 and x.shape[0] == n_data else _not_batch_first(x, n_data)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        patches = F.unfold(
            padded, module.kernel_size, dilation=module.dilation, stride=module.stride
        )
        return patches.mT.contiguous()

    def output_grads(self, grad: Tensor) -> Tensor:
        return grad.flatten(2).mT


RULES: tuple[LayerRule, ...] = (LinearRule(), Conv2dRule())


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule of a module; subclasses count only if they inherit the forward."""
    for rule in RULES:
        if isinstance(module, rule.module) and type(module).forward is rule.module.forward:
            return rule
    return None


def _not_batch_first(x: Tensor, n_data: int) -> str:
    return (
        f"its input is {list(x.shape)} for a batch of {n_data} data; "
        "the first dimension must be the batch"
    )


def is_batch_dependent(module: nn.Module) -> bool:
    """Whether train mode mixes the data of a batch (batch normalization)."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def is_stochastic(module: nn.Module) -> bool:
    """Whether train mode draws random numbers (dropout with p > 0)."""
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def describe(module: nn.Module) -> str:
    """A short name for notes: the class, and p for dropout."""
    p = getattr(module, "p", None) if is_stochastic(module) else None
    return type(module).__name__ + (f" (p={p:g})" if p is not None else "")


__all__ = ["RULES", "LayerRule", "describe", "is_batch_dependent", "is_stochastic", "rule_for"]
