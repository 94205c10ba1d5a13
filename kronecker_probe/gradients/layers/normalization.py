"""Normalizations: y = w o xhat + b, so that G = sum_t d_t o xhat_t for w, sum_t d_t for b."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from kronecker_probe.gradients.layers.base import Call, Form, Rule, total


class NormalizationRule(Rule):
    """A function of torch with an m x 1 weight and bias, whose channels are the second dimension.

    xhat is what the same function gives without both.
    """

    def __init__(self, function: Callable[..., Any], *arguments: str) -> None:
        self.function = function
        self.arguments = ("input", *arguments)

    def problem(self, options: Mapping[str, Any]) -> str:
        return "it uses the statistics of the batch" if options.get("training") else ""

    def n_lead(self, call: Call) -> int:
        return 1

    def width(self, call: Call) -> int:
        return call.output_shape[1]

    def form(self, role: str, call: Call) -> Form:
        return Form.VECTOR

    def output_rows(self, role: str, call: Call, gradient: Tensor) -> Tensor:
        if role == "bias":
            return self.rows(gradient)
        x = call.x.to(torch.promote_types(call.x.dtype, torch.float32))
        return self.rows(gradient.to(x.dtype) * self.normalized(x, call))

    def normalized(self, x: Tensor, call: Call) -> Tensor:
        """xhat, of the input's shape."""
        options = dict(call.options)
        if self.function is F.instance_norm and options.get("use_input_stats", True):
            # they would be written into the running ones
            options |= {"running_mean": None, "running_var": None}
        wide = {k: v.to(x.dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
        found: Tensor = self.function(x, **wide)
        return found

    def rows(self, product: Tensor) -> Tensor:
        """[*lead, m] from a tensor of the output's shape."""
        return product if product.ndim == 2 else total(product.flatten(2))


@final
class LastDimensionRule(NormalizationRule):
    """Channels are the last dimension, and every other may be the batch."""

    def problem(self, options: Mapping[str, Any]) -> str:
        shape = tuple(options["normalized_shape"])
        return "" if len(shape) == 1 else f"it normalizes {len(shape)} dimensions"

    def n_lead(self, call: Call) -> int:
        return len(call.output_shape) - 1

    def width(self, call: Call) -> int:
        return call.output_shape[-1]

    def normalized(self, x: Tensor, call: Call) -> Tensor:
        if self.function is F.rms_norm and call.options.get("eps") is None:
            # the default depends on the input's own dtype
            return F.rms_norm(call.x, call.options["normalized_shape"]).to(x.dtype)
        return super().normalized(x, call)

    def rows(self, product: Tensor) -> Tensor:
        return product


NORMALIZATIONS: tuple[Rule, ...] = (
    LastDimensionRule(F.layer_norm, "normalized_shape", "weight", "bias", "eps"),
    LastDimensionRule(F.rms_norm, "normalized_shape", "weight", "eps"),
    NormalizationRule(
        F.batch_norm, "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
    ),
    NormalizationRule(F.group_norm, "num_groups", "weight", "bias", "eps"),
    NormalizationRule(
        F.instance_norm, "running_mean", "running_var", "weight", "bias", "use_input_stats",
        "momentum", "eps",
    ),
)  # fmt: skip
