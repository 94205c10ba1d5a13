"""What a step refuses, before it changes anything."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, NonFiniteError, UnsupportedError
from kronecker_probe.linalg.precision import state_dtype


def check_parameter(param: Tensor, name: str) -> None:
    """Refuses parameters that are not real floating-point numbers.

    Raises:
        UnsupportedError: Complex, integer or sparse.
    """
    if not param.is_floating_point() or param.layout != torch.strided:
        raise UnsupportedError(
            f"{name} is {param.dtype}, {param.layout}; these optimizers take dense real "
            "floating-point parameters. Leave it to another optimizer."
        )


def check_number(value: object, name: str, holds: Callable[[float], bool], text: str) -> None:
    """Refuses what is no finite number in a range.

    Raises:
        InvalidInputError: It is not.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (real and math.isfinite(value) and holds(float(value))):  # type: ignore[arg-type]
        raise InvalidInputError(f"{name} is {value!r}; it must be a finite number, {text}.")


def check_betas(value: object, name: str) -> None:
    """Refuses what are no two decays.

    Raises:
        InvalidInputError: It is not.
    """
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise InvalidInputError(f"{name} is {value!r}; it must be two numbers in [0, 1).")
    for one in value:
        text = "in [0, 1); for a sum of statistics use statistics={'accumulate': 'sum'}"
        check_number(one, name, lambda v: 0 <= v < 1, text)


def check_gradients(
    params: Sequence[Tensor],
    name_of: Callable[[Tensor], str],
    *,
    weight: float = 1.0,
    skip: bool = False,
) -> bool:
    """Refuses gradients that would spoil the state, with one transfer from each device and dtype.

    Args:
        params: Parameters with a gradient.
        name_of: The name of a parameter in messages, asked for only when one is refused.
        weight: What squares are multiplied by: B of root-free methods.
        skip: Answer False instead where one is not finite.

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
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    name_of: Callable[[Tensor], str],
    *,
    skip: bool = False,
) -> bool:
    """Refuses steps that would write a NaN or an infinity into a weight.

    Args:
        params: Parameters.
        updates: Of each.
        name_of: The name of a parameter in messages.
        skip: Answer False instead where one is not finite.

    Returns:
        Whether the weights may be changed.

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


def _norms(gradients: Sequence[Tensor]) -> list[float]:
    """Frobenius norms; not finite where an entry is not, or where the squares overflow."""
    batches: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, gradient in enumerate(gradients):
        key = gradient.device, state_dtype(gradient.dtype)
        batches.setdefault(key, []).append(index)
    norms = [0.0] * len(gradients)
    for (_, dtype), indices in batches.items():
        found = torch._foreach_norm([gradients[index] for index in indices], 2, dtype=dtype)
        for index, norm in zip(indices, torch.stack(found).tolist(), strict=True):
            norms[index] = norm
    return norms
