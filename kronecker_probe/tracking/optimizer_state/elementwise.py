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
from kronecker_probe.tracking.optimizer_state.reader import ParameterState, parameter_state
from kronecker_probe.tracking.optimizer_state.registry import register_optimizer_state


@register_optimizer_state(torch.optim.Adam, torch.optim.AdamW)
def adam(optimizer: Optimizer, parameter: Tensor) -> DiagonalOperator:
    """Adam and AdamW: P = diag((sqrt(v / (1 - beta2^t)) + eps)^2).

    With amsgrad v is the largest one so far, before the correction, as torch has it. M is the
    first moment over 1 - beta1^t.
    """
    state = parameter_state(optimizer, parameter)
    key = "max_exp_avg_sq" if state.option("amsgrad") else "exp_avg_sq"
    root = math.sqrt(state.bias_correction(state.steps()))
    return _diagonal(state, _moment(state, key).sqrt().div_(root).add_(state.option("eps")))


@register_optimizer_state(torch.optim.NAdam)
def nadam(optimizer: Optimizer, parameter: Tensor) -> DiagonalOperator:
    """NAdam: P as for Adam. M is its mixture of the gradient and the first moment."""
    state = parameter_state(optimizer, parameter)
    corrected = _moment(state, "exp_avg_sq").div(state.bias_correction(state.steps()))
    return _diagonal(state, corrected.sqrt_().add_(state.option("eps")))


@register_optimizer_state(torch.optim.RMSprop)
def rmsprop(optimizer: Optimizer, parameter: Tensor) -> DiagonalOperator:
    """RMSprop: P = diag((sqrt(v) + eps)^2), where centered with v - g^2 of the mean gradient g.

    M is the gradient of the step. With momentum the update sums such directions of all steps,
    each with the P of its time; this P is that of the last one.
    """
    state = parameter_state(optimizer, parameter)
    state.steps()
    moment = _moment(state, "square_avg")
    if state.option("centered"):
        mean = state.tensor("grad_avg")
        moment = moment.addcmul(mean, mean, value=-1)
        negative = int((moment < 0).sum())
        if negative:
            raise UnsupportedError(
                f"the centered second moment of {state.kind} is negative in {negative} entries, by "
                f"the rounding of {moment.dtype}: its root is NaN"
            )
    return _diagonal(state, moment.sqrt().add_(state.option("eps")))


@register_optimizer_state(torch.optim.Adagrad)
def adagrad(optimizer: Optimizer, parameter: Tensor) -> DiagonalOperator:
    """Adagrad: P = diag((sqrt(s) + eps)^2) with the sum s of squared gradients.

    M is the gradient; the decay of the learning rate is no part of P.
    """
    state = parameter_state(optimizer, parameter)
    state.steps()
    return _diagonal(state, _moment(state, "sum").sqrt().add_(state.option("eps")))


def _moment(state: ParameterState, key: str) -> Tensor:
    moment = state.tensor(key)
    if bool((moment < 0).any()):
        raise UnsupportedError(f'the "{key}" of {state.kind} is negative in places')
    if state.group.get("fused"):  # the fused kernels compute in at least float32
        moment = moment.to(torch.promote_types(moment.dtype, torch.float32))
    return moment


def _diagonal(state: ParameterState, denominator: Tensor) -> DiagonalOperator:
    return DiagonalOperator(state.squared(denominator).reshape(state.matrix_shape))
