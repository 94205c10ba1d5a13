"""Readers of optimizer state, ours and the user's, by the optimizer that they read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from kronecker_probe.errors import InvalidInputError, UnsupportedError
from kronecker_probe.operators.base import Operator

Reader = Callable[[Any, Tensor], Operator]
Applies = Callable[[Any, Tensor], bool]
_Given = TypeVar("_Given", bound=Reader)

_READERS: dict[type | Applies, Reader] = {}


def register_optimizer_state(
    *optimizers: type | Applies,
) -> Callable[[_Given], _Given]:
    """Registers a reader of the preconditioner that an optimizer has in use, as a decorator.

    The reader is ``reader(optimizer, parameter) -> operator``: the P of direction = P^(-1/2) M,
    an operator on R^{m x n} with m the first dimension of the parameter and n the product of the
    others, as the optimizer holds it now. Where there is none it raises ``UnsupportedError`` with
    the reason, which the table then says. It appears as the approximation "in-use".

    Args:
        optimizers: Classes of optimizers, each with its derived classes that keep its ``step``; or
            functions of (optimizer, parameter) that say whether the reader applies. Classes
            are asked before functions, what is registered later before what is earlier.

    Returns:
        A decorator that returns the reader as it is.

    Raises:
        InvalidInputError: Nothing is given, neither a class nor a function, or one that has a
            reader already.
    """
    if not optimizers or not all(map(callable, optimizers)):
        raise InvalidInputError(
            f"register_optimizer_state got {optimizers!r}; give a class of optimizers, as in "
            "@register_optimizer_state(MyOptimizer)."
        )
    for key in optimizers:
        if key in _READERS:
            raise InvalidInputError(
                f"{_name(key)} has a reader of its state already; register one for each class."
            )

    def register(reader: _Given) -> _Given:
        if not callable(reader):
            raise InvalidInputError(
                f"The reader of {', '.join(map(_name, optimizers))} is a {type(reader).__name__}; "
                "decorate a function of (optimizer, parameter)."
            )
        _READERS.update(dict.fromkeys(optimizers, reader))
        return reader

    return register


def find_reader(optimizer: Optimizer, parameter: Tensor) -> Reader:
    """The reader of an optimizer's state.

    Raises:
        UnsupportedError: There is none; the message names the optimizer and the remedy.
    """
    for key, reader in reversed(_READERS.items()):
        if isinstance(key, type) and runs_step_of(optimizer, key):
            return reader
    kind = type(optimizer).__name__
    for attribute in ("optimizer", "optim", "base_optimizer"):
        inner = getattr(optimizer, attribute, None)
        if isinstance(inner, Optimizer):
            raise UnsupportedError(
                f"{kind} has no operator(parameter): it wraps a {type(inner).__name__}; give "
                f"that one (its .{attribute}) to the tracker"
            )
    for key, reader in reversed(_READERS.items()):
        if not isinstance(key, type) and key(optimizer, parameter):
            return reader
    known = ", ".join(_name(key) for key in _READERS if isinstance(key, type))
    raise UnsupportedError(
        f"{kind} has no operator(parameter), and its state has no reader (those of {known} and "
        f"SOAP have); write one with kp.register_optimizer_state({kind})"
    )


def runs_step_of(optimizer: object, known: type) -> bool:
    """Whether its ``step`` is that of ``known``: a derived class with its own may do anything."""
    if not isinstance(optimizer, known):
        return False
    # torch wraps the step of each class for its profiler
    steps = (getattr(kind, "step", None) for kind in (type(optimizer), known))
    one, other = (None if step is None else inspect.unwrap(step) for step in steps)
    return one is other


def _name(key: type | Applies) -> str:
    return getattr(key, "__name__", repr(key))
