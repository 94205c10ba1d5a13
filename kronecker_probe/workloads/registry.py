"""Workloads by name, ours and the user's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.workloads.workload import Workload

_Factory = TypeVar("_Factory", bound=Callable[[int], Workload])
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

WORKLOADS: dict[str, Callable[[int], Workload]] = {}
"""Name -> function of the seed."""


def register_workload(name: str) -> Callable[[_Factory], _Factory]:
    """Registers a workload, as a decorator of ``factory(seed) -> Workload``.

    It then has a name like a built-in one, in ``load_workload`` and on the command line.

    Args:
        name: Letters, digits, ".", "_" and "-"; it also names the default run directory.

    Returns:
        A decorator that returns the factory as it is.

    Raises:
        InvalidInputError: Another name, or one that is taken.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidInputError(
            f"A workload cannot be named {name!r}; use letters, digits, '.', '_' and '-', as in "
            '@register_workload("my-mlp").'
        )
    if name in WORKLOADS:
        raise InvalidInputError(f"There is a workload {name!r} already; choose another name.")

    def register(factory: _Factory) -> _Factory:
        if not callable(factory):
            raise InvalidInputError(
                f"The workload {name!r} is a {type(factory).__name__}; decorate a function of the "
                "seed that returns a kronecker_probe.Workload."
            )
        WORKLOADS[name] = factory
        return factory

    return register
