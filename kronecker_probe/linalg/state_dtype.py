"""The precision of the optimizers' statistics and products."""

from __future__ import annotations

import torch

from kronecker_probe.linalg.precision import full_precision

__all__ = ["full_precision", "state_dtype"]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's statistics: its own, but at least float32."""
    return torch.promote_types(dtype, torch.float32)
