"""What the sections of an optimizer's options share."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from kronecker_probe.errors import InvalidInputError, unknown_name


class Config:
    """A frozen dataclass whose fields are checked; in a state dict it is a dict of them."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises InvalidInputError or UnknownNameError for a value out of range."""

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

    def _number(self, name: str, holds: Callable[[float], bool], text: str) -> None:
        value = getattr(self, name)
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (real and math.isfinite(value) and holds(value)):
            raise InvalidInputError(f"{self.section}.{name} is {value!r}; it must be {text}.")

    def _nonnegative(self, name: str) -> None:
        self._number(name, lambda value: value >= 0, "a finite number of at least 0")

    def _decay(self, name: str) -> None:
        self._number(name, lambda value: 0 <= value < 1, "a number in [0, 1)")

    def _count(self, name: str, least: int = 1) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidInputError(
                f"{self.section}.{name} is {value!r}; it must be an integer of at least {least}."
            )

    def _flag(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, bool):
            raise InvalidInputError(f"{self.section}.{name} is {value!r}; give True or False.")

    def _one_of(self, name: str, names: tuple[str, ...]) -> None:
        if getattr(self, name) not in names:
            raise unknown_name(f"{self.section}.{name}", getattr(self, name), names)
