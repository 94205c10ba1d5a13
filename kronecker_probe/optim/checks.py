"""What a step refuses, before it changes anything."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, NonFiniteError, UnsupportedError
from kronecker_probe.optim.precision import state_dtype


def check_parameter(param: Tensor, name: str) -> None:
    """Refuses parameters that are not real floating-point numbers.

    Raises:
        UnsupportedError: Complex, integer or sparse.
    """
    if not param.is_floating_point() or param.layout != torch.strided:
        raise UnsupportedError(
            f"{name} is {param.dtype}, {param.layout}; Shampoo takes dense real floating-point "
            "parameters. Leave it to another optimizer."
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
    params: Sequence[Tensor], name_of: Callable[[Tensor], str], *, skip: bool = False
) -> bool:
    """Refuses gradients that would spoil the state, with one transfer from each device and dtype.

    Args:
        params: Parameters with a gradient.
        name_of: The name of a parameter in messages, asked for only when one is refused.
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
                f"{name_of(param)} has a sparse gradient, which Shampoo does not take. "
                "Use sparse=False in its layer, or another optimizer for it."
            )
        gradients.append(param.grad)
    for param, gradient, norm in zip(params, gradients, _norms(gradients), strict=True):
        limit = math.sqrt(torch.finfo(state_dtype(gradient.dtype)).max)
        if norm < limit:
            continue
        if skip:
            return False
        if gradient.isfinite().all():
            raise NonFiniteError(
                f"The gradient of {name_of(param)} has a norm above {limit:.3g}, whose square "
                "overflows its statistics. Nothing was changed: scale the loss down."
            )
        raise NonFiniteError(
            f"The gradient of {name_of(param)} holds a NaN or an infinity. Nothing was "
            "changed: skip this batch, clip, or lower the learning rate."
        )
    return True


def loaded_groups(
    loaded: Mapping[str, Any], own: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The groups of a loaded state dict, as many and as large as the optimizer's own.

    Raises:
        InvalidInputError: No state dict of an optimizer on these parameters.
    """
    if not isinstance(loaded, Mapping) or not {"state", "param_groups"} <= loaded.keys():
        raise InvalidInputError("A state dict of an optimizer has 'state' and 'param_groups'.")
    groups = list(loaded["param_groups"])
    theirs, ours = ([len(g["params"]) for g in some] for some in (groups, own))
    if theirs != ours:
        raise InvalidInputError(
            f"The loaded state has groups of {theirs} parameters, the optimizer of {ours}. Load "
            "the state of the same model and groups."
        )
    return groups


def check_state(
    state: object, shapes: Mapping[str, tuple[int, ...]], own: tuple[int, ...], name: str
) -> None:
    """Refuses a loaded state that does not fit its parameter.

    Args:
        state: The state of one parameter, as loaded.
        shapes: The tensors that the optimizer holds for it, with their shapes.
        own: The shape of the parameter, which its momentum has.
        name: The parameter, for messages.

    Raises:
        InvalidInputError: Not a state of this optimizer, or one of another shape.
    """
    if not isinstance(state, dict) or not all(
        isinstance(state.get(key), int) for key in ("step", "batch")
    ):
        raise InvalidInputError(
            f"The loaded state of {name} is not one of this optimizer: no int 'step' and 'batch'."
        )
    known = {**shapes, "momentum_buffer": own}
    for key, value in state.items():
        if key in ("step", "batch"):
            continue
        if key not in known or not isinstance(value, Tensor):
            raise InvalidInputError(
                f"The loaded state of {name} holds {key!r}, which is no state of this optimizer "
                f"under the loaded options. Known: {', '.join(sorted(known))}."
            )
        if tuple(value.shape) != known[key]:
            raise InvalidInputError(
                f"{key} in the loaded state of {name} has shape {list(value.shape)}; the parameter "
                f"needs {list(known[key])}. Load the state of the same model."
            )
    if missing := shapes.keys() - state.keys():
        raise InvalidInputError(
            f"The loaded state of {name} lacks {', '.join(sorted(missing))}, which the loaded "
            "options need. Save and load all of a state dict."
        )


def _norms(gradients: list[Tensor]) -> list[float]:
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
