"""From directions to weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kronecker_probe.optim.options.groups import Group, recipe_of


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
        p.to(torch.promote_types(p.dtype, u.dtype)) for p, u in zip(params, updates, strict=True)
    ]
    if mu > 0:
        torch._foreach_mul_(updates, rates)
        if decay > 0:
            torch._foreach_add_(updates, _like(wide, updates), alpha=decay)
        buffers = [buffer_of(param) for param in params]
        torch._foreach_mul_(buffers, mu)
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(wide, _like(buffers, wide), alpha=-lr)
    else:
        updates = _like(updates, wide)
        if decay > 0:
            torch._foreach_mul_(wide, 1 - lr * decay)
        if len(set(rates)) > 1:
            torch._foreach_mul_(updates, rates)
            rates = [1.0]
        torch._foreach_add_(wide, updates, alpha=-lr * rates[0])
    for param, full in zip(params, wide, strict=True):
        if param is not full:
            param.copy_(full)


def new_buffer(param: Tensor, group: Group) -> Tensor:
    """The momentum of a parameter before its first step."""
    return torch.zeros_like(param, dtype=recipe_of(group).state_dtype(param.dtype))


def _like(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """``tensors`` in the dtypes of ``others``."""
    return [one.to(other.dtype) for one, other in zip(tensors, others, strict=True)]


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
