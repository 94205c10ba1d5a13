"""Models with data to train and measure: the built-in ones, and the user's own by name.

In: a name and a seed.
Out: a :class:`Workload`: model, loss, data and defaults for training.
May import: ``gradients`` (for the type of a loss), ``errors``.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from kronecker_probe.errors import InvalidInputError, unknown_name

# the built-in ones register themselves
from kronecker_probe.workloads import digits, pydoc  # noqa: F401
from kronecker_probe.workloads.registry import WORKLOADS, register_workload
from kronecker_probe.workloads.workload import Workload


def load_workload(name: str, seed: int = 0) -> Workload:
    """A workload by its registered name, or by ``package.module:factory``.

    The factory takes the seed and returns a :class:`Workload`; modules are found as by Python
    itself, and in the working directory. Torch's generator is seeded before the call.

    Raises:
        UnknownNameError: No workload is registered by this name.
        InvalidInputError: The module, or the factory in it, cannot be found or fails its contract.
    """
    factory = _imported(name) if ":" in name else WORKLOADS.get(name)
    if factory is None:
        raise unknown_name("workload (or give package.module:factory)", name, WORKLOADS)
    try:
        inspect.signature(factory).bind(seed)
    except TypeError as error:
        raise InvalidInputError(
            f"{name} cannot be called with the seed ({error}); define it as def factory(seed)."
        ) from error
    torch.manual_seed(seed)
    workload = factory(seed)
    if not isinstance(workload, Workload):
        raise InvalidInputError(
            f"{name} returned a {type(workload).__name__}; a factory takes the seed and returns a "
            "kronecker_probe.Workload."
        )
    return workload


def _imported(name: str) -> Callable[[int], Workload]:
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise InvalidInputError(f"{name!r} names no module; give package.module:factory.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the user's module exists and misses an import of its own
        raise InvalidInputError(
            f"No module {module_name!r} (searched the installed packages and {here}); "
            "give package.module:factory."
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise InvalidInputError(
            f"{module_name} has no function {attribute!r}; define def {attribute or 'factory'}"
            "(seed) that returns a kronecker_probe.Workload."
        )
    return factory  # type: ignore[no-any-return]


__all__ = ["WORKLOADS", "Workload", "load_workload", "register_workload"]
