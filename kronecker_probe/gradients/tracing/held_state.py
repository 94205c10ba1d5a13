"""All state that a model holds, in attributes and in objects of its own: saved and put back."""

from __future__ import annotations

import functools
import random
import sys
import types
import warnings
from collections import deque
from collections.abc import Iterator
from operator import is_
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

_Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any]
_SIMPLE = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device})
# not walked into: what these hold is of the training, not of the model
_OTHERS = (Dataset, DataLoader, Sampler, torch.optim.Optimizer, type)
_WALKED = (nn.Module, types.SimpleNamespace, torch.quasirandom.SobolEngine)
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "pandas", "pyarrow"}
_MOST = 20_000  # objects that are walked into
_LARGEST = 1 << 28  # bytes of tensors and arrays in such objects that are copied


@final
class HeldState:
    """What a model holds: containers, objects, tensors, arrays, random generators, iterators.

    Found in attributes of its modules, in dicts, lists, tuples, sets and deques there, and in
    attributes of other objects, but for datasets, loaders, optimizers, and most classes of torch
    and of the standard library. Of tensors and arrays in such objects 256 MB are copied; of further
    tensors, as of iterators that cannot be set back, only a change is noticed.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._found = list(_reachable(model))  # kept, so that no id is used twice
        self._containers: list[tuple[_Container, Any]] = []
        self._slots: list[tuple[object, str, object]] = []
        self._values: list[tuple[Tensor, Tensor]] = []
        self._watched: list[tuple[str, Tensor, int]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._generators: list[tuple[object, object]] = []
        self._iterators: list[tuple[str, Iterator[Any], object]] = []
        left = _LARGEST
        for name, value, foreign in self._found:
            if isinstance(value, (Tensor, np.ndarray)):
                size = value.nbytes if foreign and _is_dense(value) else 0
                self._save_values(name, value, copied=size <= left)
                left -= size if size <= left else 0
            elif isinstance(value, (dict, list, set, deque)):
                self._containers.append((value, _copy(value)))
            elif (state := _generator_state(value)) is not None:
                self._generators.append((value, state))
            elif isinstance(value, Iterator):
                self._iterators.append((name, value, _position(value)))
            else:
                self._slots += [(value, slot, content) for slot, content in _slots(value)]

    def _save_values(
        self, name: str, value: Tensor | np.ndarray[Any, Any], *, copied: bool
    ) -> None:
        if isinstance(value, np.ndarray):
            if copied and value.flags.writeable and not value.dtype.hasobject:
                self._arrays.append((value, value.copy()))
        elif copied and _is_dense(value):
            self._values.append((value, value.detach().clone()))
        elif not copied and not value.is_inference():
            self._watched.append((name, value, value._version))

    def restore(self) -> None:
        """Put back everything that has changed; what cannot be put back is named in a warning."""
        for container, saved in self._containers:
            _restore(container, saved)
        for owner, slot, content in self._slots:
            if getattr(owner, slot, None) is not content:
                object.__setattr__(owner, slot, content)
        with torch.no_grad():
            for tensor, value in self._values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        for array, values in self._arrays:
            np.copyto(array, values)
        for generator, state in self._generators:
            _set_generator_state(generator, state)
        for name, iterator, position in self._iterators:
            if not _set_position(iterator, position):
                _warn(name, iterator)
        for name, tensor, version in self._watched:
            if tensor._version != version:
                _warn(name, tensor)


def held_tensors(model: nn.Module) -> list[Tensor]:
    """Every tensor that a model holds, parameters and buffers included, each once."""
    return [value for _, value, _ in _reachable(model) if isinstance(value, Tensor)]


def _warn(name: str, value: object) -> None:
    warnings.warn(
        f"A forward pass changes {name}, a {type(value).__name__} whose state cannot be put back, "
        "so that measuring changes the training. Keep a number, a torch.Generator or a buffer of "
        "the module in its place, or keep it out of the forward pass.",
        RuntimeWarning,
        stacklevel=6,
    )


def _reachable(model: nn.Module) -> Iterator[tuple[str, Any, bool]]:
    """Every mutable value that the model holds, once.

    Yields:
        Its path, the value, and whether it is reached through an object that is no module.
    """
    seen: set[int] = set()
    objects = 0
    todo: list[tuple[str, Any, bool]] = [
        (name or type(model).__name__, vars(module), False)
        for name, module in model.named_modules()
    ]
    while todo:
        found = path, value, foreign = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        inner: list[tuple[Any, Any]]
        if isinstance(value, dict):
            inner = list(value.items())
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            inner = list(enumerate(value))
        elif _is_leaf(value):
            inner = []
        elif objects < _MOST and _is_walked(type(value)):  # type: ignore[arg-type]
            objects += 1
            foreign = foreign or not isinstance(value, nn.Module)
            inner = [("", getattr(value, "__dict__", None)), *_slots(value)]
        else:
            continue
        if not isinstance(value, (tuple, frozenset)):
            yield found
        for key, held in inner:
            if type(held) not in _SIMPLE:
                todo.append((f"{path}.{key}" if key != "" else path, held, foreign))


def _is_leaf(value: object) -> bool:
    return isinstance(value, (Tensor, np.ndarray, Iterator)) or _generator_state(value) is not None


@functools.lru_cache(maxsize=4096)
def _is_walked(kind: type) -> bool:
    """Whether the attributes of objects of a class are part of the model."""
    if issubclass(kind, _OTHERS):
        return False
    library = kind.__module__.partition(".")[0] in _LIBRARIES
    return issubclass(kind, _WALKED) or not library


def _slots(value: object) -> list[tuple[str, Any]]:
    """The attributes that an object has beside its ``__dict__``."""
    names = _slot_names(type(value))  # type: ignore[arg-type]
    return [(name, getattr(value, name)) for name in names if hasattr(value, name)]


@functools.lru_cache(maxsize=4096)
def _slot_names(kind: type) -> tuple[str, ...]:
    given = (vars(base).get("__slots__", ()) for base in kind.__mro__)
    every = (name for names in given for name in ((names,) if isinstance(names, str) else names))
    return tuple(name for name in every if not name.startswith("__"))


def _is_dense(value: Tensor | np.ndarray[Any, Any]) -> bool:
    """Whether it can be compared; nothing writes into a sparse or a nested tensor."""
    if not isinstance(value, Tensor):
        return True
    return value.layout == torch.strided and not value.is_nested


def _copy(container: _Container) -> Any:
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def _restore(container: _Container, saved: Any) -> None:
    if _same(container, saved):
        return
    if isinstance(container, dict):
        for name in container.keys() - saved.keys():
            del container[name]
        for name, value in saved.items():
            if name not in container or container[name] is not value:
                container[name] = value
        return
    container.clear()
    if isinstance(container, set):
        container.update(saved)
    else:
        container.extend(saved)


def _same(container: _Container, saved: Any) -> bool:
    if len(container) != len(saved):
        return False
    if isinstance(container, set):
        return bool(container == saved)
    if isinstance(container, dict):
        values = map(is_, container.values(), saved.values())
        return all(map(is_, container, saved)) and all(values)
    return all(map(is_, container, saved))


def _generator_state(value: object) -> object | None:
    """The state of a random generator; None of anything else."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.BitGenerator):
        return value.state
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate()
    return None


def _set_generator_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.BitGenerator):
        generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _position(iterator: Iterator[Any]) -> object:
    """Where an iterator stands, as far as it says so."""
    if isinstance(iterator, types.GeneratorType):
        frame = iterator.gi_frame
        return None if frame is None else (frame.f_lasti, *frame.f_locals.values())
    try:
        with warnings.catch_warnings():  # itertools deprecate this in Python 3.12
            warnings.simplefilter("ignore")
            return iterator.__reduce__()
    except Exception:  # an iterator of any class, of which only the text may change
        return repr(iterator)


def _set_position(iterator: Iterator[Any], position: Any) -> bool:
    """Move an iterator back; False where it moved and cannot be."""
    if _same_position(_position(iterator), position):
        return True
    if isinstance(position, tuple) and len(position) == 3 and hasattr(iterator, "__setstate__"):
        iterator.__setstate__(position[2])
    return _same_position(_position(iterator), position)


def _same_position(one: object, other: object) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same_position, one, other))
    simple = type(one) is type(other) and isinstance(one, (bool, int, float, str))
    return one is other or (simple and one == other)
