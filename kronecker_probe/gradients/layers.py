"""One rule a module kind: how a layer's parameter gradient factors into inputs and outputs."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor, nn


class LayerRule(abc.ABC):
    """How G_i = sum_t d_it a_it^T reads off one call of a module.

    Attributes:
        module: The class that the rule is for.
        methods: What a subclass must inherit for the rule to hold.
    """

    module: ClassVar[type[nn.Module]]
    methods: ClassVar[tuple[str, ...]]

    def refusal(self, module: nn.Module) -> str:
        """Why this module's weight cannot be measured; empty when it can."""
        for method in self.methods:
            own = getattr(type(module), method) is not getattr(self.module, method)
            if own or method in vars(module):
                return f"{type(module).__name__} overrides {method}() of {self.module.__name__}"
        return self.limits(module)

    @abc.abstractmethod
    def limits(self, module: nn.Module) -> str:
        """Which of the module's settings has no exact treatment; empty when none."""

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
    methods = ("forward",)

    def limits(self, module: nn.Module) -> str:
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
    methods = ("forward", "_conv_forward")

    def limits(self, module: nn.Module) -> str:
        assert isinstance(module, nn.Conv2d)
        if module.groups != 1:
            return f"Conv2d with groups={module.groups} is not supported (only groups=1)"
        return ""

    def batch_problem(self, module: nn.Module, x: Tensor, n_data: int) -> str:
        return "" if x.ndim == 4 and x.shape[0] == n_data else _not_batch_first(x, n_data)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = F.pad(x, _padding(module), mode=mode)
        kernel = tuple(module.weight.shape[2:])
        patches = F.unfold(padded, kernel, dilation=module.dilation, stride=module.stride)
        return patches.mT.contiguous()

    def output_grads(self, grad: Tensor) -> Tensor:
        return grad.flatten(2).mT


def _padding(module: nn.Conv2d) -> Sequence[int]:
    """(left, right, top, bottom), from the attributes that the forward pass reads.

    Zero padding is read off ``padding`` at every call, because models change it (and dilation)
    after construction; the other modes use what the constructor derived.
    """
    if module.padding_mode != "zeros":
        return module._reversed_padding_repeated_twice
    if module.padding == "valid":
        return (0, 0, 0, 0)
    if module.padding == "same":
        kernel = module.weight.shape[2:]
        total = [d * (k - 1) for d, k in zip(_pair(module.dilation), kernel, strict=True)]
        return [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    height, width = _pair(module.padding)
    return (width, width, height, height)


def _pair(value: str | int | Sequence[int]) -> Sequence[int]:
    assert not isinstance(value, str)
    return (value, value) if isinstance(value, int) else value


RULES: tuple[LayerRule, ...] = (LinearRule(), Conv2dRule())


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule of a module or of the class that it derives from."""
    return next((rule for rule in RULES if isinstance(module, rule.module)), None)


def _not_batch_first(x: Tensor, n_data: int) -> str:
    return (
        f"its input is {list(x.shape)} for a batch of {n_data} data; "
        "the first dimension must be the batch"
    )


def is_batch_dependent(module: nn.Module) -> bool:
    """Whether train mode uses statistics of the batch (batch or tracking instance norm)."""
    instance = isinstance(module, nn.modules.instancenorm._InstanceNorm)
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or (
        instance and bool(module.track_running_stats)
    )


def is_stochastic(module: nn.Module) -> bool:
    """Whether train mode draws random numbers (dropout with p > 0)."""
    return isinstance(module, nn.RReLU) or _dropout(module) > 0


def _dropout(module: nn.Module) -> float:
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return float(module.dropout)
    return float(module.p) if isinstance(module, nn.modules.dropout._DropoutNd) else 0.0


def describe(module: nn.Module) -> str:
    """A short name for notes: the class, and p for dropout."""
    p = _dropout(module)
    return type(module).__name__ + (f" (p={p:g})" if p > 0 else "")


__all__ = ["RULES", "LayerRule", "describe", "is_batch_dependent", "is_stochastic", "rule_for"]
