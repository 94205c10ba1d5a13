"""Memory for what a step computes on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

# Bytes of a tensor that is kept for the next step; products of larger ones outweigh their memory.
_LARGEST = 2**24


@final
class Scratch:
    """Memory of intermediate results, kept from step to step on a CPU.

    There, fresh memory of some MB can cost more than the product that fills it, as the system
    clears every page of it anew. An accelerator's allocator keeps its memory by itself.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialized memory, until the same name is asked for again.

        Args:
            name: Of the use.
            shape: Of the tensor.
            like: Has its dtype and device.
        """
        size = math.prod(shape)
        if like.device.type != "cpu" or size * like.element_size() > _LARGEST:
            return like.new_empty(tuple(shape))
        held = self._held.get((name, like.dtype))
        if held is None or held.numel() < size:
            held = self._held[name, like.dtype] = like.new_empty(size)
        return held[:size].view(tuple(shape))
