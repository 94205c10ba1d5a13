"""Convolutions, unfolded: output pixels are shared positions, n = in/groups x kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch.nn.functional as F
from torch import Tensor

from kronecker_probe.gradients.layers.base import Call, Form, ProductRule, total


@final
class ConvolutionRule(ProductRule):
    """F.conv1d, F.conv2d and F.conv3d with stride, padding, dilation and groups.

    With groups, G is block by block: only G itself is kept, because its rows have other inputs.
    """

    arguments = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

    def __init__(self, function: Callable[..., Any], spatial: int) -> None:
        self.function = function
        self.spatial = spatial

    def problem(self, options: Mapping[str, Any]) -> str:
        return ""

    def n_lead(self, call: Call) -> int:
        return len(call.output_shape) - self.spatial - 1

    def width(self, call: Call) -> int:
        return call.output_shape[-self.spatial - 1]

    def form(self, role: str, call: Call) -> Form:
        if role == "bias":
            return Form.VECTOR
        return Form.FACTORS if call.options.get("groups", 1) == 1 else Form.MATRIX

    def output_rows(self, role: str, call: Call, gradient: Tensor) -> Tensor:
        pixels = gradient.flatten(-self.spatial)
        return total(pixels) if role == "bias" else pixels.mT

    def input_rows(self, role: str, call: Call) -> Tensor:
        """Patches, [*lead, P, in k k], as the weight flattens."""
        options, k = call.options, call.weight_shape[2:]
        stride = _tuple(options.get("stride", 1), self.spatial)
        dilation = _tuple(options.get("dilation", 1), self.spatial)
        sides = _padding(options.get("padding", 0), k, dilation)
        x = F.pad(call.x, sides) if any(sides) else call.x
        n_lead = len(call.lead)
        pixels = tuple(call.output_shape[n_lead + 1 :])
        *lead, channel = x.stride()[: n_lead + 1]
        steps = x.stride()[n_lead + 1 :]
        moves = [s * step for s, step in zip(stride, steps, strict=True)]
        reach = [d * step for d, step in zip(dilation, steps, strict=True)]
        # pixels last, because they are the longest runs in memory
        windows = x.as_strided(
            (*x.shape[:n_lead], x.shape[n_lead], *k, *pixels),
            (*lead, channel, *reach, *moves),
            x.storage_offset(),
        )
        return windows.reshape(*x.shape[:n_lead], -1, math.prod(pixels)).mT

    def input_bytes(self, call: Call) -> int:
        pixels = math.prod(call.output_shape) // self.width(call)
        patch = math.prod(call.weight_shape[1:]) * call.options.get("groups", 1)
        return int(pixels * patch * call.x.element_size())

    def matrices(self, role: str, call: Call, d: Tensor, a: Tensor) -> Tensor:
        groups = call.options.get("groups", 1)
        if groups == 1:
            return super().matrices(role, call, d, a)
        n_examples, positions, m = d.shape
        d = d.reshape(n_examples, positions, groups, m // groups).transpose(1, 2)
        a = a.reshape(n_examples, positions, groups, -1).transpose(1, 2).to(d.dtype)
        return (d.mT @ a).reshape(n_examples, m, -1)


def _tuple(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * count
    return tuple(value) * (count if len(value) == 1 else 1)


def _padding(
    value: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """(left, right) of the last dimension first, as F.pad takes it."""
    if value == "valid":
        value = 0
    if value == "same":  # the odd one of an even kernel goes behind, as torch does it
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    assert not isinstance(value, str)
    return [side for size in reversed(_tuple(value, len(kernel))) for side in (size, size)]


CONVOLUTIONS = tuple(
    ConvolutionRule(function, spatial)
    for function, spatial in ((F.conv1d, 1), (F.conv2d, 2), (F.conv3d, 3))
)
