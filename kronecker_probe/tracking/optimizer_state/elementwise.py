"""torch's optimizers that divide entry by entry: P is diagonal.

Denominators are computed with torch's operations, in the dtype that it uses, so that an epsilon
that underflows there does so here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.operators.structures.diagonal import DiagonalOperator
from kronecker_probe.tracking.optimizer_state.reader import Held, find_held
from kronecker_probe.tracking.optimizer_state.registry import register_optimizer_state


@register_optimizer_state(torch.optim.Adam, torch.optim.AdamW)
def adam(optimizer: Optimizer, parameter: Tensor) -> DiagonalOperator:
    """Adam and AdamW: P = diag((sqrt(v / (1 - beta2^t)) + eps)^2).

    With amsgrad v is the largest one so far, before the correction, as torch has it. M is the
    first moment over 1 - beta1^t.
    """
    held = find_held(optimizer, parameter)
    key = "max_exp_avg_sq" if held.option("amsgrad") else "exp_avg_sq"
    root = math.sqrt(held.bias_correction(held.steps()))
    return _diagonal(held, _moment(held, key).sqrt().div_(root).add_(held.option("eps")))


@register_optimizer_state(torch.optim.NAdam)
def nadam(optimizer: Optimizer, parameter: Tensor) -> DiagonalOperator:
    """NAdam: P as for Adam. M is its mixture of the gradient and the first moment."""
    held = find_held(optimizer, parameter)
    corrected = _moment(held, "exp_avg_sq").div(held.bias_correction(held.steps()))
    return _diagonal(held, corrected.sqrt_().add_(held.option("eps")))


@register_optimizer_state(torch.optim.RMSprop)
def rmsprop(optimizer: Optimizer, parameter: Tensor) -> DiagonalOperator:
    """RMSprop: P = diag((sqrt(v) + eps)^2), where centered with v - g^2 of the mean gradient g.

    M is the gradient of the step. With momentum the update sums such directions of all steps,
    each with the P of its time; this P is that of the last one.
    """
    held = find_held(optimizer, parameter)
    held.steps()
    moment = _moment(held, "square_avg")
    if held.option("centered"):
        mean = held.tensor("grad_avg")
        moment = moment.addcmul(mean, mean, value=-1)
        negative = int((moment < 0).sum())
        if negative:
            raise UnsupportedError(
                f"the centered second moment of {held.kind} is negative in {negative} entries, by "
                f"the rounding of {moment.dtype}: its root is NaN"
            )
    return _diagonal(held, moment.sqrt().add_(held.option("eps")))


@register_optimizer_state(torch.optim.Adagrad)
def adagrad(optimizer: Optimizer, parameter: Tensor) -> DiagonalOperator:
    """Adagrad: P = diag((sqrt(s) + eps)^2) with the sum s of squared gradients.

    M is the gradient; the decay of the learning rate is no part of P.
    """
    held = find_held(optimizer, parameter)
    held.steps()
    return _diagonal(held, _moment(held, "sum").sqrt().add_(held.option("eps")))


def _moment(held: Held, key: str) -> Tensor:
    moment = held.tensor(key)
    if bool((moment < 0).any()):
        raise UnsupportedError(f'the "{key}" of {held.kind} is negative in places')
    if held.group.get("fused"):  # the fused kernels compute in at least float32
        moment = moment.to(torch.promote_types(moment.dtype, torch.float32))
    return moment


def _diagonal(held: Held, denominator: Tensor) -> DiagonalOperator:
    return DiagonalOperator(held.squared(denominator).reshape(held.matrix_shape))
