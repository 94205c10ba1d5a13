"""Normalizations: y = w o xhat + b, so that G = sum_t d_t o xhat_t for w, sum_t d_t for b."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from kronecker_probe.gradients.layers.base import Call, Form, Rule, total


class NormalizationRule(Rule):
    """An m x 1 weight and bias; ``normalized`` is the same function without both."""

    def form(self, role: str, call: Call) -> Form:
        return Form.VECTOR

    def output_rows(self, role: str, call: Call, gradient: Tensor) -> Tensor:
        if role == "bias":
            return self.rows(gradient)
        x = call.x.to(torch.promote_types(call.x.dtype, torch.float32))
        return self.rows(gradient.to(x.dtype) * self.normalized(call, x))

    @abc.abstractmethod
    def normalized(self, call: Call, x: Tensor) -> Tensor:
        """xhat, of the input's shape."""

    @abc.abstractmethod
    def rows(self, product: Tensor) -> Tensor:
        """[*lead, m] from a tensor of the output's shape."""


class LastDimensionRule(NormalizationRule):
    """Features are the last dimension, every other may be the batch."""

    def problem(self, options: Mapping[str, Any]) -> str:
        shape = tuple(options["normalized_shape"])
        return "" if len(shape) == 1 else f"it normalizes {len(shape)} dimensions"

    def n_lead(self, call: Call) -> int:
        return len(call.output_shape) - 1

    def width(self, call: Call) -> int:
        return call.output_shape[-1]

    def rows(self, product: Tensor) -> Tensor:
        return product


@final
class LayerNormRule(LastDimensionRule):
    """F.layer_norm over one dimension."""

    function = staticmethod(F.layer_norm)
    arguments = ("input", "normalized_shape", "weight", "bias", "eps")

    def normalized(self, call: Call, x: Tensor) -> Tensor:
        return F.layer_norm(x, call.options["normalized_shape"], eps=call.options.get("eps", 1e-5))


@final
class RMSNormRule(LastDimensionRule):
    """F.rms_norm over one dimension."""

    function = staticmethod(F.rms_norm)
    arguments = ("input", "normalized_shape", "weight", "eps")

    def normalized(self, call: Call, x: Tensor) -> Tensor:
        shape, eps = call.options["normalized_shape"], call.options.get("eps")
        if eps is None:  # the default depends on the input's own dtype
            return F.rms_norm(call.x, shape).to(x.dtype)
        return F.rms_norm(x, shape, eps=eps)


class ChannelRule(NormalizationRule):
    """Channels are the second dimension, the first is the batch."""

    def problem(self, options: Mapping[str, Any]) -> str:
        return ""

    def n_lead(self, call: Call) -> int:
        return 1

    def width(self, call: Call) -> int:
        return call.output_shape[1]

    def rows(self, product: Tensor) -> Tensor:
        return product if product.ndim == 2 else total(product.flatten(2))


@final
class BatchNormRule(ChannelRule):
    """F.batch_norm with running statistics."""

    function = staticmethod(F.batch_norm)
    arguments = (
        "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
    )  # fmt: skip

    def problem(self, options: Mapping[str, Any]) -> str:
        return "it uses the statistics of the batch" if options.get("training") else ""

    def normalized(self, call: Call, x: Tensor) -> Tensor:
        mean, var = call.options["running_mean"], call.options["running_var"]
        eps = call.options.get("eps", 1e-5)
        return F.batch_norm(x, mean.to(x.dtype), var.to(x.dtype), eps=eps)


@final
class GroupNormRule(ChannelRule):
    """F.group_norm."""

    function = staticmethod(F.group_norm)
    arguments = ("input", "num_groups", "weight", "bias", "eps")

    def normalized(self, call: Call, x: Tensor) -> Tensor:
        return F.group_norm(x, call.options["num_groups"], eps=call.options.get("eps", 1e-5))


@final
class InstanceNormRule(ChannelRule):
    """F.instance_norm, by its own or by running statistics."""

    function = staticmethod(F.instance_norm)
    arguments = (
        "input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum",
        "eps",
    )  # fmt: skip

    def normalized(self, call: Call, x: Tensor) -> Tensor:
        options, eps = call.options, call.options.get("eps", 1e-5)
        if options.get("use_input_stats", True):
            return F.instance_norm(x, eps=eps)
        mean, var = options["running_mean"].to(x.dtype), options["running_var"].to(x.dtype)
        return F.instance_norm(x, mean, var, use_input_stats=False, eps=eps)


NORMALIZATIONS: tuple[Rule, ...] = (
    LayerNormRule(),
    RMSNormRule(),
    BatchNormRule(),
    GroupNormRule(),
    InstanceNormRule(),
)
