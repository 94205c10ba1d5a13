"""From directions to weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kronecker_probe.optim.groups import Group
from kronecker_probe.optim.precision import state_dtype


def apply_updates(
    group: Group,
    params: Sequence[Tensor],
    updates: list[Tensor],
    steps: Sequence[int],
    buffer_of: Callable[[Tensor], Tensor],
) -> None:
    """W <- (1 - lr weight_decay) W - lr U, or by way of the momentum.

    Parameters of less precision than their state are stepped in that of the state and rounded once.

    Args:
        group: Options.
        params: W, in place.
        updates: U before the bias correction of M; used up.
        steps: Of each parameter.
        buffer_of: The momentum of a parameter.
    """
    lr, decay, mu = group["lr"], group["weight_decay"], group["momentum"]
    rates = [
        _rate(group, step) * _shape_factor(group, p) for p, step in zip(params, steps, strict=True)
    ]
    wide = [
        p if p.dtype == u.dtype else p.to(u.dtype) for p, u in zip(params, updates, strict=True)
    ]
    if mu > 0:
        torch._foreach_mul_(updates, rates)
        if decay > 0:
            torch._foreach_add_(updates, wide, alpha=decay)
        buffers = [buffer_of(param) for param in params]
        torch._foreach_mul_(buffers, mu)
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(wide, buffers, alpha=-lr)
    else:
        if decay > 0:
            torch._foreach_mul_(wide, 1 - lr * decay)
        if len(set(rates)) > 1:
            torch._foreach_mul_(updates, rates)
            rates = [1.0]
        torch._foreach_add_(wide, updates, alpha=-lr * rates[0])
    for param, full in zip(params, wide, strict=True):
        if param is not full:
            param.copy_(full)


def new_buffer(param: Tensor) -> Tensor:
    """The momentum of a parameter before its first step."""
    return torch.zeros_like(param, dtype=state_dtype(param.dtype))


def _rate(group: Group, step: int) -> float:
    """1 / (1 - beta1^t), if the update scales with M at all: a polar factor has length 1."""
    fixed = group["spectrum"].eigenvalues == "polar" and group["magnitude"].grafting == "none"
    if fixed or not group["statistics"].bias_correction:
        return 1.0
    return float(1.0 / (1.0 - group["betas"][0] ** step))


def _shape_factor(group: Group, param: Tensor) -> float:
    if not group["scale_by_shape"] or param.ndim == 0:
        return 1.0
    return math.sqrt(max(1.0, param.shape[0] ** 2 / param.numel()))
