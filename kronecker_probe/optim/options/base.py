"""What the sections of an optimizer's options share: fields that say which values they take."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from kronecker_probe.errors import InvalidInputError, unknown_name

# Refuses a value, by its full name: section.field.
Check = Callable[[str, Any], None]


def option(default: Any, *, check: Check) -> Any:
    """A field of a section, with its default and the check of its values."""
    return dataclasses.field(default=default, metadata={"check": check})


def number(text: str, holds: Callable[[float], bool]) -> Check:
    """A finite number for which ``holds`` does; ``text`` says that in words."""

    def check(name: str, value: Any) -> None:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (real and math.isfinite(value) and holds(value)):
            raise InvalidInputError(f"{name} is {value!r}; it must be {text}.")

    return check


NONNEGATIVE = number("a finite number of at least 0", lambda value: value >= 0)
DECAY = number("a number in [0, 1)", lambda value: 0 <= value < 1)


def count(least: int) -> Check:
    """An integer of at least so much."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidInputError(
                f"{name} is {value!r}; it must be an integer of at least {least}."
            )

    return check


def one_of(*names: str) -> Check:
    """One of these names."""

    def check(name: str, value: Any) -> None:
        if value not in names:
            raise unknown_name(name, value, names)

    return check


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise InvalidInputError(f"{name} is {value!r}; give True or False.")


def or_none(check: Check) -> Check:
    """None, or what ``check`` takes."""
    return lambda name, value: None if value is None else check(name, value)


class Config:
    """A frozen dataclass of :func:`option`; in a state dict it is a dict of plain values."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            field.metadata["check"](f"{self.section}.{field.name}", getattr(self, field.name))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as a state dict holds them."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    def replace(self, **changes: Any) -> Self:
        """The same with other values of some fields.

        Raises:
            UnknownNameError: There is no such field.
            InvalidInputError: A value out of range.
        """
        known = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        for name in changes:
            if name not in known:
                raise unknown_name(f"option of {self.section}", name, known)
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    @classmethod
    def of(cls, given: Self | Mapping[str, Any]) -> Self:
        """Itself, or the one that a dict of its fields stands for.

        Raises:
            InvalidInputError: Something else, or a value out of range.
            UnknownNameError: There is no such field.
        """
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise InvalidInputError(
                f"{cls.section} is a {type(given).__name__}; give a {cls.__name__}, or a dict of "
                "its fields."
            )
        return cls().replace(**given)
