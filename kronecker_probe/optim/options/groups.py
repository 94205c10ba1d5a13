"""The options of a parameter group: what they may be, and what may change between steps."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.optim.options.kinds import Recipe
from kronecker_probe.optim.options.reading import read
from kronecker_probe.optim.options.sections import SECTIONS

Group = dict[str, Any]

# Keys of a group that are no options: torch's own, a scheduler's, and a label.
NOT_OPTIONS = (
    "params",
    "param_names",
    "name",
    "initial_lr",
    "max_lr",
    "min_lr",
    "max_momentum",
    "base_momentum",
)

# What each group must have.
OPTIONS = ("lr", "betas", "weight_decay", "momentum", "nesterov", "scale_by_shape", *SECTIONS)
_READ = ("betas", "nesterov", "scale_by_shape", *SECTIONS)

# Fields that tensors of the state, or their meaning, depend on: all of a section, or some.
_STRUCTURE = {
    "statistics": ("rule", "q", "accumulate", "bias_correction", "every", "initial",
                   "loss_reduction"),
    "shapes": ("block_size", "max_dim", "merge", "vectors"),
    "storage": ("factors", "roots"),
    "spectrum": ("eigenvalues", "root"),
    "inverse": ("structure", "precision"),
    "basis": ("solver",),
    "magnitude": ("grafting",),
}  # fmt: skip


def checked_recipe(group: Mapping[str, Any], where: str) -> Recipe:
    """The choices of a group, whose options are in range and go together.

    Args:
        group: All options.
        where: Which group, for messages.

    Raises:
        InvalidInputError: An option that is absent, out of range or not one of the chosen kind.
    """
    for name in OPTIONS:
        if name not in group:
            raise InvalidInputError(f"{name}{where} is not there any more; put it back.")
    for name, kind in SECTIONS.items():
        if not isinstance(group[name], kind):
            raise InvalidInputError(
                f"{name}{where} is {group[name]!r}; give a {kind.__name__}, or a dict of its "
                "fields where the group is added."
            )
    for name in ("lr", "weight_decay"):
        _check_number(group[name], f"{name}{where}", lambda v: v >= 0, "at least 0")
    _check_number(group["momentum"], f"momentum{where}", lambda v: 0 <= v < 1, "in [0, 1)")
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise InvalidInputError(f"betas{where} is {betas!r}; it must be two numbers in [0, 1).")
    for one in betas:
        text = "in [0, 1); for a sum of statistics use statistics={'accumulate': 'sum'}"
        _check_number(one, f"betas{where}", lambda v: 0 <= v < 1, text)
    for name in ("nesterov", "scale_by_shape"):
        if not isinstance(group[name], bool):
            raise InvalidInputError(f"{name}{where} is {group[name]!r}; give True or False.")
    return recipe_of(group)


def recipe_of(group: Mapping[str, Any]) -> Recipe:
    """The choices of a checked group; the same object for equal options."""
    return read(**{**{name: group[name] for name in _READ}, "betas": tuple(group["betas"])})


def structure(group: Mapping[str, Any]) -> dict[str, object]:
    """What the state depends on, by the name of the option."""
    found = {
        f"{section}.{name}": getattr(group[section], name)
        for section, names in _STRUCTURE.items()
        for name in names
    }
    found["basis.tolerance is None"] = group["basis"].tolerance is None
    found["betas[0] > 0"] = group["betas"][0] > 0
    return found


def check_change(before: Mapping[str, object], group: Mapping[str, Any], where: str) -> None:
    """Refuse options that the state built with those of ``before`` does not fit.

    Raises:
        InvalidInputError: The message names the option, and both values.
    """
    for name, value in structure(group).items():
        if value != before[name]:
            raise InvalidInputError(
                f"{name}{where} was {before[name]!r} and is {value!r} now, which the state built "
                "by the steps so far does not fit. Set it back, or build another optimizer."
            )


def _check_number(value: object, name: str, holds: Callable[[float], bool], text: str) -> None:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (real and math.isfinite(value) and holds(float(value))):  # type: ignore[arg-type]
        raise InvalidInputError(f"{name} is {value!r}; it must be a finite number, {text}.")
