"""Measuring a model without leaving a trace: state, mode, RNG and autocast cache come back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import numpy as np
import torch
from torch import nn

from kronecker_probe.gradients.tracing.held_state import HeldState


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients on; everything is put back on leaving, also by an error.

    Training flags are set module by module, so that no overridden train() runs. What a forward
    pass changes is restored: values of parameters (an embedding with max_norm) and buffers,
    everything that the modules hold (:class:`HeldState`: attributes, tensors, arrays, objects and
    random generators of their own), requires_grad, and the generators of Python, NumPy, the CPU and
    every device that holds a parameter. Compiled models run eagerly, because hooks do not fire in
    compiled code. Autocast stays as the caller has it, but without its cache of cast weights, which
    would hide how often a weight is used. Recurrent layers run without cuDNN, which differentiates
    them in training mode only.

    Warns:
        RuntimeWarning: The forward pass changes an object that cannot be put back; names it.
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
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    held = HeldState(model)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad = flag
        held.restore()


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
