"""What the user's loss is: recognized by its gradients, split into one share per example.

In: a loss function, outputs and targets. Out: ``ResolvedLoss``, with Hessian roots and labels.
May import: gradients.tracing.isolation, linalg and errors.
"""

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
