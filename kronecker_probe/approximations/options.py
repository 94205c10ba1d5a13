"""Specs: the name of an approximation with its options, as text "name:option=value,..."."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import TypeAlias

from kronecker_probe.errors import InvalidInputError, unknown_name

Value: TypeAlias = int | float


@dataclass(frozen=True)
class Option:
    """One option of an approximation.

    Attributes:
        name: As in the spec.
        integer: Whether it counts something.
        low: The smallest value.
        high: The largest; None for no bound.
        remedy: What to give instead of a bad value.
        default: The value that a label leaves out; None for none.
        required: Whether it must be given.
    """

    name: str
    integer: bool
    low: float
    high: float | None
    remedy: str
    default: Value | None = None
    required: bool = False

    def read(self, owner: str, given: object) -> Value:
        """The value of ``given``, a number or its text ("2", "0.5", "1/2").

        Raises:
            InvalidInputError: Not a number, not an integer where one is needed, or out of range.
        """
        number = _number(given)
        bad = (
            number is None
            or (self.integer and number.denominator != 1)
            or number < self.low
            or (self.high is not None and number > self.high)
        )
        if bad or number is None:
            raise InvalidInputError(f"{owner} got {self.name}={given!r}; {self.remedy}.")
        return int(number) if self.integer else float(number)


def _number(given: object) -> Fraction | None:
    if isinstance(given, bool) or not isinstance(given, str | Integral | Real):
        return None
    try:
        return Fraction(given) if isinstance(given, str) else Fraction(float(given))
    except (ValueError, OverflowError, ZeroDivisionError):
        return None


@dataclass(frozen=True)
class Spec:
    """An approximation and the options that it does not take by default.

    Attributes:
        name: A key of APPROXIMATIONS.
        options: (option, value) in their declared order.
    """

    name: str
    options: tuple[tuple[str, Value], ...] = ()

    @property
    def label(self) -> str:
        """The canonical text, "divergence:q=0"; it resolves to this spec again."""
        if not self.options:
            return self.name
        return f"{self.name}:" + ",".join(f"{key}={_text(value)}" for key, value in self.options)


def _text(value: Value) -> str:
    return str(int(value)) if float(value).is_integer() else repr(value)


def split(text: str) -> tuple[str, dict[str, str]]:
    """Name and raw options of "name:option=value,...".

    Raises:
        InvalidInputError: Not of that form, or an option that is given twice.
    """
    name, colon, rest = (part.strip() for part in text.partition(":"))
    given: dict[str, str] = {}
    for item in rest.split(",") if colon else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value):
            raise InvalidInputError(
                f"Approximation {text!r}: {item!r} is no option; write name:option=value,... as in "
                "'optimal:rank=2,block_size=128'."
            )
        if key in given:
            raise InvalidInputError(f"Approximation {text!r} gives {key!r} twice; give it once.")
        given[key] = value
    return name, given


def read_options(
    name: str, given: Mapping[str, object], known: Sequence[Option]
) -> tuple[tuple[str, Value], ...]:
    """The options ``given`` to ``name``, checked, in declared order, without defaults.

    Raises:
        UnknownNameError: It has no such option; the message suggests the nearest.
        InvalidInputError: A bad value, or a required option that is missing.
    """
    by_name = {option.name: option for option in known}
    for key in given:
        if key not in by_name:
            raise unknown_name(f"option of {name!r}", key, by_name)
    found: list[tuple[str, Value]] = []
    for option in known:
        if given.get(option.name) is None:
            if option.required:
                raise InvalidInputError(f"{name} needs {option.name}; {option.remedy}.")
            continue
        value = option.read(name, given[option.name])
        if value != option.default:
            found.append((option.name, value))
    return tuple(found)
