"""Matrix products: every leading dimension besides the batch is a shared position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch.nn.functional as F
from torch import Tensor

from kronecker_probe.gradients.layers.base import Call, Form, ProductRule


@final
class LinearRule(ProductRule):
    """F.linear: y = W x + b, G = sum_t d_t a_t^T, and sum_t d_t for the bias."""

    function = staticmethod(F.linear)
    arguments = ("input", "weight", "bias")

    def problem(self, options: Mapping[str, Any]) -> str:
        return "" if options["weight"].ndim == 2 else "its weight is not a matrix"

    def n_lead(self, call: Call) -> int:
        return len(call.output_shape) - 1

    def width(self, call: Call) -> int:
        return call.output_shape[-1]

    def form(self, role: str, call: Call) -> Form:
        return Form.FACTORS if role == "weight" else Form.VECTOR

    def output_rows(self, role: str, call: Call, gradient: Tensor) -> Tensor:
        return gradient

    def input_rows(self, role: str, call: Call) -> Tensor:
        return call.x
