"""Running averages that are held in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

# The bits of float32 that bfloat16 drops, and the golden ratio's share of them.
_DROPPED = 0xFFFF
_STRIDE = 40503


def store(values: Tensor, held: Tensor, update: int) -> None:
    """Round ``values`` into ``held`` without bias over successive updates.

    An average with decay .999 changes by a thousandth in an update, and bfloat16 has steps of 1/256
    to 1/128: rounded to the nearest, it would stand still. Here a number is rounded up if what
    bfloat16 drops of it exceeds a threshold, which runs through [0, 1) by steps of the golden
    ratio; no random number is drawn. While an entry changes evenly the errors of its updates
    cancel. Where it changes without relation to the thresholds they are like random ones at worst:
    an average with decay beta is off by half a step over sqrt(1 - beta^2) (a standard deviation;
    entry by entry).

    Args:
        values: Finite, used up if they are float32.
        held: Of the same shape, in bfloat16.
        update: Counts up by 1 from one update to the next.
    """
    wide = values.float()
    threshold = update * _STRIDE & _DROPPED
    wide.view(torch.int32).add_(threshold).bitwise_and_(~_DROPPED)
    held.copy_(wide)
