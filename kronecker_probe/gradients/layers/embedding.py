"""Table look-ups: the one-hot inputs are token indices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch.nn.functional as F
from torch import Tensor

from kronecker_probe.gradients.layers.base import Call, Form, ProductRule
from kronecker_probe.linalg.rearrangement import one_hot_products


@final
class EmbeddingRule(ProductRule):
    """F.embedding: G = sum_t e_k(t) d_t^T, [V, D]; the row of padding_idx gets no gradient.

    max_norm renormalizes the table before the look-up and is no part of the gradient; sparse
    only changes how autograd stores it.
    """

    function = staticmethod(F.embedding)
    arguments = (
        "input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse",
    )  # fmt: skip

    def problem(self, options: Mapping[str, Any]) -> str:
        if options.get("scale_grad_by_freq"):
            return "scale_grad_by_freq=True divides its gradients by counts over the whole batch"
        return ""

    def n_lead(self, call: Call) -> int:
        return len(call.output_shape) - 1

    def width(self, call: Call) -> int:
        return call.output_shape[-1]

    def form(self, role: str, call: Call) -> Form:
        return Form.TOKENS

    def output_rows(self, role: str, call: Call, gradient: Tensor) -> Tensor:
        padding = call.options.get("padding_idx")
        if padding is None:
            return gradient
        padding %= call.weight_shape[0]
        return gradient.masked_fill((call.x == padding)[..., None], 0)

    def input_rows(self, role: str, call: Call) -> Tensor:
        return call.x[..., None]

    def matrices(self, role: str, call: Call, d: Tensor, a: Tensor) -> Tensor:
        return one_hot_products(a[..., 0].long(), d, call.weight_shape[0])
