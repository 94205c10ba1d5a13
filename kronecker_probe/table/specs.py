"""The text "name:option=value,..." that names an approximation or a metric with its options."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, TypeAlias

from kronecker_probe.errors import InvalidInputError, unknown_name

Value: TypeAlias = int | float


@dataclass(frozen=True)
class Option:
    """One option of an approximation or a metric.

    Attributes:
        name: As in the spec.
        remedy: What to give instead of a bad value.
        integer: Whether only integers are allowed.
        low: The smallest value.
        high: The largest value.
        above: Whether the value must lie above ``low``.
        default: The value where none is given; None for none.
        required: Whether it must be given.
    """

    name: str
    remedy: str
    integer: bool = False
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    default: Value | None = None
    required: bool = False

    def read(self, owner: str, given: object) -> Value:
        """The value of ``given``, a number or its text ("2", "0.5", "1/2").

        Raises:
            InvalidInputError: Not a number, not an integer where one is needed, or out of range.
        """
        number = _number(given)
        if (
            number is None
            or (self.integer and number.denominator != 1)
            or not self.low <= number <= self.high
            or (self.above and number == self.low)
        ):
            raise InvalidInputError(f"{owner} got {self.name}={given!r}; {self.remedy}.")
        return int(number) if self.integer else float(number)


def _number(given: object) -> Fraction | None:
    if isinstance(given, bool) or not isinstance(given, str | Integral | Real):
        return None
    try:
        return (
            Fraction(given) if isinstance(given, str) and "/" in given else Fraction(float(given))
        )
    except (ValueError, OverflowError, ZeroDivisionError):
        return None


@dataclass(frozen=True)
class Spec:
    """A name with the options that were chosen.

    Attributes:
        name: Of an approximation or a metric.
        options: (option, value) in their declared order.
    """

    name: str
    options: tuple[tuple[str, Value], ...] = ()

    @property
    def label(self) -> str:
        """The canonical text, "divergence:q=0"; it resolves to this spec again."""
        return f"{self.name}{self.suffix}"

    @property
    def suffix(self) -> str:
        """The canonical text of the options, ":q=0"; "" for none."""
        chosen = ",".join(f"{key}={_text(value)}" for key, value in self.options)
        return f":{chosen}" if chosen else ""


def _text(value: Value) -> str:
    return str(int(value)) if float(value).is_integer() else repr(value)


def split_spec(kind: str, text: str) -> tuple[str, dict[str, str]]:
    """Name and raw options of "name:option=value,...".

    Args:
        kind: What the text names, for messages: "approximation" or "metric".
        text: The spec.

    Raises:
        InvalidInputError: Not of that form, or an option that is given twice.
    """
    name, colon, rest = (part.strip() for part in text.partition(":"))
    given: dict[str, str] = {}
    for item in rest.split(",") if colon else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value):
            raise InvalidInputError(
                f"The {kind} {text!r} has {item!r} in place of an option; write "
                f"{name or 'name'}:option=value,option=value."
            )
        if key in given:
            raise InvalidInputError(f"The {kind} {text!r} gives {key!r} twice; give it once.")
        given[key] = value
    return name, given


def read_options(
    kind: str, name: str, given: Mapping[str, object], known: Sequence[Option]
) -> tuple[tuple[str, Value], ...]:
    """The options of ``name``, checked, in declared order; None counts as not given.

    Args:
        kind: "approximation" or "metric", for messages.
        name: Whose options they are.
        given: Option -> a number or its text.
        known: All its options.

    Returns:
        (option, value) of all that have one, given or by default.

    Raises:
        UnknownNameError: It has no such option; the message suggests the nearest.
        InvalidInputError: A bad value, or a required option that is missing.
    """
    by_name = {option.name: option for option in known}
    for key in given:
        if not by_name:
            raise InvalidInputError(f"The {kind} {name!r} has no options; leave out {key!r}.")
        if key not in by_name:
            raise unknown_name(f"option of {name!r}", key, by_name)
    found: list[tuple[str, Value]] = []
    for option in known:
        value = given.get(option.name)
        if value is not None:
            found.append((option.name, option.read(name, value)))
        elif option.required:
            raise InvalidInputError(f"{name} needs {option.name}; {option.remedy}.")
        elif option.default is not None:
            found.append((option.name, option.default))
    return tuple(found)


def options_by_signature(function: Callable[..., Any]) -> tuple[Option, ...]:
    """The options of a user's function: its keyword-only parameters with numbers as defaults.

    Raises:
        InvalidInputError: A keyword-only parameter whose default is no number.
    """
    options = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        default = parameter.default
        if isinstance(default, bool) or not isinstance(default, int | float):
            raise InvalidInputError(
                f"{function.__qualname__} has the option {name} with the default {default!r}; "
                "give every keyword-only parameter a number as its default."
            )
        what = "an integer" if isinstance(default, int) else "a number"
        remedy = f"give {what}, for example {name}={default}"
        options.append(Option(name, remedy, isinstance(default, int), default=default))
    return tuple(options)


def check_new_name(kind: str, name: object, taken: Mapping[str, object]) -> str:
    """A name for something that a user registers.

    Raises:
        InvalidInputError: It can't be written in a spec, or is taken.
    """
    if not isinstance(name, str) or not name or not name.replace("-", "_").isidentifier():
        raise InvalidInputError(
            f"A {kind} can't be named {name!r}; use letters, digits, - and _, such as 'my-{kind}'."
        )
    if name in taken:
        raise InvalidInputError(f"There is a {kind} {name!r} already; choose another name.")
    return name
