"""From gradients and directions to weights: what a step refuses, and how it moves them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kronecker_probe.errors import NonFiniteError, UnsupportedError
from kronecker_probe.linalg.precision import state_dtype
from kronecker_probe.optim.options.groups import Group
from kronecker_probe.optim.options.kinds import Recipe

NameOf = Callable[[Tensor], str]


def check_parameter(param: Tensor, name: str) -> None:
    """Refuse parameters that are not real floating-point numbers.

    Raises:
        UnsupportedError: Complex, integer or sparse.
    """
    if not param.is_floating_point() or param.layout != torch.strided:
        raise UnsupportedError(
            f"{name} is {param.dtype}, {param.layout}; these optimizers take dense real "
            "floating-point parameters. Leave it to another optimizer."
        )


def check_gradients(
    params: Sequence[Tensor], name_of: NameOf, *, weight: float, skip: bool
) -> bool:
    """Refuse gradients that would spoil the state, with one transfer per device and dtype.

    Args:
        params: Parameters with a gradient.
        name_of: The name of a parameter in messages, asked for only when one is refused.
        weight: What squares are multiplied by: B of root-free methods.
        skip: Return False instead where one is not finite.

    Returns:
        Whether the step may be taken.

    Raises:
        UnsupportedError: A sparse gradient.
        NonFiniteError: A NaN or an infinity, or a squared norm that overflows the statistics.
    """
    gradients = []
    for param in params:
        assert param.grad is not None
        if param.grad.layout != torch.strided:
            raise UnsupportedError(
                f"{name_of(param)} has a sparse gradient, which these optimizers do not take. "
                "Use sparse=False in its layer, or another optimizer for it."
            )
        gradients.append(param.grad)
    for param, gradient, norm in zip(params, gradients, _norms(gradients), strict=True):
        limit = math.sqrt(torch.finfo(state_dtype(gradient.dtype)).max / weight)
        if norm < limit:
            continue
        if skip:
            return False
        if gradient.isfinite().all():
            raise NonFiniteError(
                f"The gradient of {name_of(param)} has a norm above {limit:.3g}, whose square "
                "overflows its statistics. Nothing was changed. Where the training has diverged, "
                "lower the learning rate, raise the damping or clip; else scale the loss down."
            )
        raise NonFiniteError(
            f"The gradient of {name_of(param)} holds a NaN or an infinity. Nothing was "
            "changed: skip this batch, clip, or lower the learning rate."
        )
    return True


def check_updates(
    params: Sequence[Tensor], updates: Sequence[Tensor], name_of: NameOf, *, skip: bool
) -> bool:
    """Refuse updates that would write a NaN or an infinity into a weight.

    Returns:
        Whether the weights may be changed; False only with ``skip``.

    Raises:
        NonFiniteError: A NaN or an infinity.
    """
    for param, update, norm in zip(params, updates, _norms(updates), strict=True):
        # squares may overflow where no entry does
        if not math.isfinite(norm) and not bool(update.isfinite().all()):
            if skip:
                return False
            raise NonFiniteError(
                f"The step of {name_of(param)} holds a NaN or an infinity, although its gradient "
                "does not. No weight was changed: raise the damping (spectrum.epsilon or "
                "inverse.damping), or build the optimizer anew."
            )
    return True


def apply_updates(
    group: Group,
    recipe: Recipe,
    params: Sequence[Tensor],
    updates: list[Tensor],
    states: Sequence[dict[str, Any]],
) -> None:
    """W <- (1 - lr weight_decay) W - lr U, or by way of the momentum, in place.

    Parameters of less precision than their state are stepped in that of the state and rounded once.
    The ``updates`` U, before the bias correction of M, are used up; ``states`` get the momentum.
    """
    lr, decay, mu = group["lr"], group["weight_decay"], group["momentum"]
    rates = [recipe.rate(state["step"], p.shape) for p, state in zip(params, states, strict=True)]
    wide = [
        p.to(torch.promote_types(p.dtype, u.dtype)) for p, u in zip(params, updates, strict=True)
    ]
    if mu > 0:
        torch._foreach_mul_(updates, rates)
        if decay > 0:
            torch._foreach_add_(updates, _like(wide, updates), alpha=decay)
        for param, state in zip(params, states, strict=True):
            if "momentum_buffer" not in state:
                dtype = recipe.state_dtype(param.dtype)
                state["momentum_buffer"] = torch.zeros_like(param, dtype=dtype)
        buffers = [state["momentum_buffer"] for state in states]
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


def _like(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """``tensors`` in the dtypes of ``others``."""
    return [one.to(other.dtype) for one, other in zip(tensors, others, strict=True)]


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    """Frobenius norms; not finite where an entry is not, or where the squares overflow."""
    batches: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        key = tensor.device, state_dtype(tensor.dtype)
        batches.setdefault(key, []).append(index)
    norms = [0.0] * len(tensors)
    for (_, dtype), indices in batches.items():
        found = torch._foreach_norm([tensors[index] for index in indices], 2, dtype=dtype)
        for index, norm in zip(indices, torch.stack(found).tolist(), strict=True):
            norms[index] = norm
    return norms
