"""The options of a parameter group: validation, and the defaults that depend on other options."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kronecker_probe.errors import InvalidInputError, unknown_name

STATISTICS = ("ema", "sum")
GRAFTING = ("adam", "sgd", "none")
# Keys of a group that are no options: torch's own, a scheduler's, and a label.
_NOT_OPTIONS = ("params", "param_names", "initial_lr", "name")
_ADAM_EPSILON = 1e-8


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    text: str


def _real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _nonnegative(value: Any) -> bool:
    return _real(value) and value >= 0


def _decay(value: Any) -> bool:
    return _real(value) and 0 <= value < 1


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _pair_of_decays(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_decay, value))


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


_NONNEGATIVE = _Rule(_nonnegative, "a finite number of at least 0 (no tensor)")
_COUNT = _Rule(_count, "an integer of at least 1")
_RULES: dict[str, _Rule] = {
    "lr": _NONNEGATIVE,
    "betas": _Rule(
        _pair_of_decays, "two numbers in [0, 1); for a sum of statistics use statistics='sum'"
    ),
    "epsilon": _NONNEGATIVE,
    "weight_decay": _NONNEGATIVE,
    "exponent": _Rule(
        _or_none(lambda value: _real(value) and -1 <= value < 0),
        "a number in [-1, 0), the power of each factor, or None for -1/(2k) of k factors",
    ),
    "precondition_frequency": _COUNT,
    "start_preconditioning_step": _Rule(
        _or_none(_count), "an integer of at least 1, or None for precondition_frequency"
    ),
    "bias_correction": _Rule(lambda value: isinstance(value, bool), "True or False"),
    "grafting_beta2": _Rule(_or_none(_decay), "a number in [0, 1), or None for betas[1]"),
    "grafting_epsilon": _Rule(
        _or_none(_nonnegative), f"a finite number of at least 0, or None for {_ADAM_EPSILON:g}"
    ),
    "max_preconditioner_dim": _COUNT,
}
_NAMES = {"statistics": STATISTICS, "grafting": GRAFTING}


def complete_group(
    group: Mapping[str, Any], defaults: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The group with every option set and checked.

    Args:
        group: What the caller gave, parameters included (they are passed through).
        defaults: The optimizer's options, for those that the group does not set.
        where: Which group, for messages.

    Raises:
        InvalidInputError: A value out of range, or an option that would have no effect.
        UnknownNameError: An unknown option, statistics or grafting.
    """
    for key in group:
        if key not in defaults and key not in _NOT_OPTIONS:
            raise unknown_name(f"option{where}", key, defaults)
    full = {**defaults, **group}
    check_options(full, where)
    if full["grafting"] != "adam":
        check_grafting_options({**group, "grafting": full["grafting"]}, where)
        full["grafting_beta2"] = full["grafting_epsilon"] = None
    elif full["grafting_beta2"] is None:
        full["grafting_beta2"] = full["betas"][1]
    if full["grafting"] == "adam" and full["grafting_epsilon"] is None:
        full["grafting_epsilon"] = _ADAM_EPSILON
    if full["start_preconditioning_step"] is None:
        full["start_preconditioning_step"] = full["precondition_frequency"]
    return full


def check_options(group: Mapping[str, Any], where: str) -> None:
    """Checks that every option is there and in its range.

    Raises:
        InvalidInputError: A value is missing or out of range.
        UnknownNameError: Unknown statistics or grafting.
    """
    missing = [key for key in (*_RULES, *_NAMES) if key not in group]
    if missing:
        raise InvalidInputError(
            f"The options{where} lack {', '.join(missing)}: they are not those of Shampoo."
        )
    for key, names in _NAMES.items():
        if group[key] not in names:
            raise unknown_name(f"{key}{where}", group[key], names)
    for key, rule in _RULES.items():
        if not rule.holds(group[key]):
            raise InvalidInputError(f"{key}{where} is {group[key]!r}; it must be {rule.text}.")


def check_grafting_options(group: Mapping[str, Any], where: str) -> None:
    """Refuses options of Adam grafting where they would have no effect.

    Raises:
        InvalidInputError: One is given, and the grafting is another one.
    """
    for key in ("grafting_beta2", "grafting_epsilon"):
        if group["grafting"] != "adam" and group.get(key) is not None:
            raise InvalidInputError(
                f"{key}{where} is {group[key]!r}, but grafting is {group['grafting']!r}, which "
                "has no second moment. Drop it, or use grafting='adam'."
            )
