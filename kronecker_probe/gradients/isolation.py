"""Measuring a model without leaving a trace: mode, RNG, buffers and autocast cache come back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients on; everything is put back on leaving, also by an error.

    Training flags are set module by module, so that no overridden train() runs. Buffers that a
    forward pass changes are restored, and so are the random generators of the CPU and of every
    device that holds a parameter. Autocast stays as the caller has it, but without its cache of
    cast weights, which would hide how often a weight is used.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    cache = torch.is_autocast_cache_enabled()
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            torch.set_autocast_cache_enabled(False)
            for module, _ in modes:
                module.training = False
            yield
    finally:
        torch.set_autocast_cache_enabled(cache)
        for module, training in modes:
            module.training = training
        for module, name, buffer, saved in buffers:
            module._buffers[name] = buffer
            if buffer is not None and saved is not None and not torch.equal(buffer, saved):
                with torch.no_grad():
                    buffer.copy_(saved)
