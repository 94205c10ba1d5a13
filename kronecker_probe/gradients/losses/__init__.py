"""What the user's loss is: recognized by its gradients, split into one share per example."""

from __future__ import annotations

from kronecker_probe.gradients.losses.evaluation import LossFunction
from kronecker_probe.gradients.losses.recognition import resolve_loss
from kronecker_probe.gradients.losses.resolved import (
    CustomLoss,
    ElementwiseLoss,
    ResolvedLoss,
    SoftmaxLoss,
)

__all__ = [
    "CustomLoss",
    "ElementwiseLoss",
    "LossFunction",
    "ResolvedLoss",
    "SoftmaxLoss",
    "resolve_loss",
]
