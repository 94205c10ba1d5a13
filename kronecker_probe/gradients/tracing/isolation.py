"""Measuring a model without leaving a trace: state, mode, RNG and autocast cache come back."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients on; everything is put back on leaving, also by an error.

    Training flags are set module by module, so that no overridden train() runs. What a forward
    pass changes is restored: values of parameters (an embedding with max_norm) and buffers,
    attributes of modules, what lists, dicts, sets and deques among them hold (and those within
    these, but not the attributes of other objects), values of tensors there, requires_grad, and
    the generators of Python, NumPy, the CPU and every device that holds a parameter. Compiled
    models run eagerly, because hooks do not fire in compiled code. Autocast stays as the caller
    has it, but without its cache of cast weights, which would hide how often a weight is used.
    Recurrent layers run without cuDNN, which differentiates them in training mode only.
    """
    with ExitStack() as stack:
        stack.enter_context(_generators_restored(model))
        stack.enter_context(_eager())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_autocast_uncached())
        stack.enter_context(_recurrent_backward(model))
        stack.enter_context(modules_restored(model))
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def modules_restored(model: nn.Module) -> Iterator[None]:
    """Puts back modes, attributes and what they hold, parameters and their flags on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    held, attributes = _contents([vars(module) for module, _ in modes])
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers(), *attributes)}
    values = [(t, t.detach().clone()) for t in tensors.values() if _is_dense(t)]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for container, contents in held:
            _restore(container, contents)
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad = flag
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def held_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and tensors in attributes and in containers there, each once."""
    attributes = _contents([vars(module) for module in model.modules()])[1]
    tensors = (*model.parameters(), *model.buffers(), *attributes)
    return list({id(tensor): tensor for tensor in tensors}.values())


_Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any]


def _contents(roots: Iterable[_Container]) -> tuple[list[tuple[_Container, Any]], list[Tensor]]:
    """Containers within containers, each with a shallow copy, and the tensors in them."""
    held: list[tuple[_Container, Any]] = []
    tensors: list[Tensor] = []
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        container = stack.pop()
        if id(container) in seen:
            continue
        seen.add(id(container))
        held.append((container, _copy(container)))
        for value in container.values() if isinstance(container, dict) else container:
            if isinstance(value, Tensor):
                tensors.append(value)
            elif isinstance(value, (dict, list, set, deque)):
                stack.append(value)
    return held, tensors


def _is_dense(tensor: Tensor) -> bool:
    """Whether it can be compared; nothing writes into a sparse or a nested one."""
    return tensor.layout == torch.strided and not tensor.is_nested


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


@contextmanager
def _generators_restored(model: nn.Module) -> Iterator[None]:
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _autocast_uncached() -> Iterator[None]:
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


@contextmanager
def _recurrent_backward(model: nn.Module) -> Iterator[None]:
    """Without cuDNN where layers recur: its kernels have no backward pass in evaluation mode."""
    enabled = torch.backends.cudnn.enabled
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


def _eager() -> AbstractContextManager[object]:
    # Where the compiler was never imported nothing is compiled, and importing it takes seconds.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
