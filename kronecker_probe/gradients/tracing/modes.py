"""What the modules of a model do otherwise in training mode, for the note of a capture."""

from __future__ import annotations

from torch import nn


def mode_note(model: nn.Module) -> str:
    """Which modules in training mode were measured in evaluation mode; empty if none."""
    active = [
        f"{_describe(module)} at {name or 'the root'}"
        for name, module in model.named_modules()
        if module.training and (_is_stochastic(module) or _is_batch_dependent(module))
    ]
    return f"measured in eval mode: {', '.join(active)}" if active else ""


def _is_batch_dependent(module: nn.Module) -> bool:
    """Whether train mode uses statistics of the batch (batch or tracking instance norm)."""
    instance = isinstance(module, nn.modules.instancenorm._InstanceNorm)
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or (
        instance and bool(module.track_running_stats)
    )


def _is_stochastic(module: nn.Module) -> bool:
    """Whether train mode draws random numbers (dropout with p > 0)."""
    return isinstance(module, nn.RReLU) or _dropout(module) > 0


def _dropout(module: nn.Module) -> float:
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return float(module.dropout)
    return float(module.p) if isinstance(module, nn.modules.dropout._DropoutNd) else 0.0


def _describe(module: nn.Module) -> str:
    """The class, and p for dropout."""
    p = _dropout(module)
    return type(module).__name__ + (f" (p={p:g})" if p > 0 else "")
