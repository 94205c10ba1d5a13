"""States that are loaded: what fits, as copies in their own precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.optim.engine.stack import state_shapes
from kronecker_probe.optim.options.groups import Group, checked_recipe, recipe_of
from kronecker_probe.optim.options.sections import SECTIONS
from kronecker_probe.optim.preconditioners.factored import COUNTERS

# Tensors of whole numbers.
COUNTS = {*COUNTERS, "offset"}
_WHOLE = (torch.int64,)
_REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def checked_groups(
    loaded: Mapping[str, Any], own: Sequence[Group], options: Mapping[str, Any]
) -> list[Group]:
    """The loaded groups with their sections as configs.

    Args:
        loaded: A state dict.
        own: The groups of the optimizer.
        options: What each group must have.

    Raises:
        InvalidInputError: Not a state dict of this optimizer on these parameters, or an option
            out of range.
    """
    groups = [dict(group) for group in _same_groups(loaded, own)]
    for index, group in enumerate(groups):
        where = f" of loaded parameter group {index}"
        missing = [key for key in options if key not in group]
        if missing:
            raise InvalidInputError(
                f"The options{where} lack {', '.join(missing)}: they are not those of this "
                "optimizer."
            )
        for section, kind in SECTIONS.items():
            group[section] = kind.of(group[section])
        checked_recipe(group, where)
    return groups


def checked_states(
    loaded: Mapping[str, Any],
    groups: Sequence[Group],
    own: Sequence[Group],
    name_of: Callable[[Tensor], str],
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Copies of the loaded states with their parameters, in the precision of the state.

    Args:
        loaded: A state dict.
        groups: Its groups, checked.
        own: Those of the optimizer.
        name_of: The name of a parameter in messages.

    Raises:
        InvalidInputError: One that does not fit its parameter.
    """
    known = {key for given in groups for key in given["params"]}
    if foreign := [key for key in loaded["state"] if key not in known]:
        raise InvalidInputError(
            f"The loaded state is of a parameter {foreign[0]!r} that is in no loaded group. Save "
            "and load all of a state dict."
        )
    for ours, given in zip(own, groups, strict=True):
        for param, key in zip(ours["params"], given["params"], strict=True):
            if state := loaded["state"].get(key):
                shapes = state_shapes(param, recipe_of(given))
                _check_state(state, shapes, tuple(param.shape), name_of(param))
                dtype = recipe_of(given).state_dtype(param.dtype)
                yield param, {k: _copied(v, param, dtype) for k, v in state.items()}


def _same_groups(
    loaded: Mapping[str, Any], own: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The groups of a loaded state dict, as many and as large as the optimizer's own.

    Raises:
        InvalidInputError: No state dict of an optimizer on these parameters.
    """
    if not isinstance(loaded, Mapping) or not {"state", "param_groups"} <= loaded.keys():
        raise InvalidInputError("A state dict of an optimizer has 'state' and 'param_groups'.")
    groups = list(loaded["param_groups"])
    if not all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups):
        raise InvalidInputError("A parameter group of the loaded state has no list of 'params'.")
    theirs, ours = ([len(g["params"]) for g in some] for some in (groups, own))
    if theirs != ours:
        raise InvalidInputError(
            f"The loaded state has groups of {theirs} parameters, the optimizer of {ours}. Load "
            "the state of the same model and groups."
        )
    return groups


def _check_state(
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
    counts = [state.get(key) if isinstance(state, dict) else None for key in ("step", "batch")]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise InvalidInputError(
            f"The loaded state of {name} is not one of this optimizer: no counts 'step' and "
            f"'batch', but {counts}."
        )
    assert isinstance(state, dict)
    known = {**shapes, "momentum_buffer": own}
    for key, value in state.items():
        if key in ("step", "batch"):
            continue
        if key not in known or not isinstance(value, Tensor):
            raise InvalidInputError(
                f"The loaded state of {name} holds {key!r}, which is no state of this optimizer "
                f"under the loaded options. Known: {', '.join(sorted(known))}."
            )
        _check_values(key, value, name)
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


def _check_values(key: str, value: Tensor, name: str) -> None:
    counts = key.rpartition(".")[2] in COUNTS
    if value.dtype not in (_WHOLE if counts else _REAL):
        raise InvalidInputError(f"{key} in the loaded state of {name} is of {value.dtype}.")
    if not counts and not bool(value.isfinite().all()):
        raise InvalidInputError(
            f"{key} in the loaded state of {name} holds a NaN or an infinity: load an earlier one."
        )


def _copied(value: Any, param: Tensor, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return value.clone()
    return value.to(device=param.device, dtype=dtype, copy=True)
