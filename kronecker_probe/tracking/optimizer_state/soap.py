"""SOAP (arXiv 2409.11321): Adam's division in the eigenbasis of Shampoo."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.linalg.memory import available_bytes
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.structures.diagonal import DiagonalOperator
from kronecker_probe.operators.structures.eigen import EigenOperator
from kronecker_probe.tracking.optimizer_state.reader import ParameterState, parameter_state
from kronecker_probe.tracking.optimizer_state.registry import register_optimizer_state

_SIDES = ("Q_L", "Q_R")


def _looks_like(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Whether the state of the parameter, or of any other, is laid out like SOAP's."""
    states = [optimizer.state.get(parameter), *optimizer.state.values()]
    return any(
        isinstance(state, dict) and "exp_avg_sq" in state and ("Q" in state or _SIDES[0] in state)
        for state in states
    )


@register_optimizer_state(_looks_like)
def soap(optimizer: Optimizer, parameter: Tensor) -> Operator:
    r"""P = (Q_L kron Q_R) diag(d^2) (Q_L kron Q_R)^T with the denominators d of the step.

    ``exp_avg_sq`` is v, the second moment in the bases Q. Two conventions are known:

    - authors' code and pytorch_optimizer: d = (sqrt(v) + eps) / sqrt(1 - beta2^t);
    - Emerging-Optimizers: d = sqrt(v / (1 - beta2^t)) + eps;

    both with d = sqrt(v) + eps where ``correct_bias`` is False. A dimension without a basis
    (None or empty) is the identity. M is the first moment, over 1 - beta1^t, in the coordinates
    of the parameter.

    Raises:
        UnsupportedError: No eigenbasis or second moment yet, bases for another view of the
            parameter than m x n (merged, blocked or more dimensions), bases that are not
            orthonormal, or an optimizer of another convention.
    """
    state = parameter_state(optimizer, parameter)
    bases = _bases(state)
    steps = state.steps()
    moment = state.tensor("exp_avg_sq")
    if bool((moment < 0).any()):
        raise UnsupportedError(f"the rotated second moment of {state.kind} is negative in places")
    if not bool(moment.any()):
        raise UnsupportedError(
            f"the second moment of {state.kind} is zero: no step with a gradient was taken yet"
        )
    squared = state.squared(_denominator(state, moment, steps)).reshape(state.matrix_shape)
    left, right = bases
    if left is None and right is None:
        return DiagonalOperator(squared)
    sides = [
        _identity(state, size) if basis is None else basis.double()
        for basis, size in zip(bases, state.matrix_shape, strict=True)
    ]
    return EigenOperator(sides[0], sides[1], squared, exact=True)


def _denominator(state: ParameterState, moment: Tensor, steps: int) -> Tensor:
    epsilon, optimizer = float(state.option("eps")), state.optimizer
    group = state.group
    # Bases and moments look the same in every code; the options tell which one it is.
    # Emerging-Optimizers moved its options from the group to the optimizer.
    if "max_update_rms" in group or hasattr(optimizer, "max_update_rms"):
        corrects = group.get("correct_bias", getattr(optimizer, "correct_bias", None))
        inside = False
    elif _authors_options(state):
        corrects, inside = group["correct_bias"], True
    else:
        corrects, inside = None, False
    if not isinstance(corrects, bool):
        raise UnsupportedError(
            f"{state.kind} has the state of SOAP, but not the options of the authors' code, "
            "pytorch_optimizer or Emerging-Optimizers: how it corrects the bias of its second "
            "moment is not known"
        )
    correction = state.bias_correction(steps) if corrects else 1.0
    if inside:
        return moment.sqrt().add_(epsilon).div_(math.sqrt(correction))
    return moment.div(correction).sqrt_().add_(epsilon)


def _authors_options(state: ParameterState) -> bool:
    """Whether the group is that of the authors' code or pytorch_optimizer."""
    names = state.group.keys()
    limits = {"max_precond_dim", "max_precondition_dim"}
    # a variant with "warmup_steps" corrects the averages themselves, and takes max(sqrt(v), eps)
    return "correct_bias" in names and bool(limits & names) and "warmup_steps" not in names


def _bases(state: ParameterState) -> tuple[Tensor | None, Tensor | None]:
    """Q_L [m, m] and Q_R [n, n], None where the side is the identity."""
    entries = state.entries
    if "Q" not in entries and _SIDES[0] not in entries:
        raise UnsupportedError(f"{state.kind} holds no eigenbasis for this parameter yet")
    if "Q" not in entries and _SIDES[1] not in entries:
        raise UnsupportedError(f'{state.kind} holds "Q_L" without "Q_R" for this parameter')
    given = entries["Q"] if "Q" in entries else [entries[side] for side in _SIDES]
    if given is None:
        raise UnsupportedError(f"{state.kind} holds no eigenbasis for this parameter yet")
    if not isinstance(given, (list, tuple)):
        raise UnsupportedError(
            f'the "Q" that {state.kind} holds is a {type(given).__name__}, not a list of bases'
        )
    absent = [basis is None or len(basis) == 0 for basis in given]
    if all(absent):
        return None, None
    if state.parameter.ndim != 2 or len(given) != 2:
        raise UnsupportedError(
            f"{state.kind} holds {len(given)} bases for a parameter of shape "
            f"{list(state.parameter.shape)}; two for a matrix can be read (turn the merging of "
            "dimensions off, or do not measure this layer)"
        )
    left, right = (
        None if none else _checked_basis(state, basis, size)
        for basis, none, size in zip(given, absent, state.matrix_shape, strict=True)
    )
    return left, right


def _checked_basis(state: ParameterState, basis: object, size: int) -> Tensor:
    checked = state.checked("eigenbasis", basis, (size, size))
    vectors = checked.double()
    residual = float((vectors.mT @ vectors).sub_(_eye(size, vectors.device)).abs().max())
    if residual > math.sqrt(torch.finfo(checked.dtype).eps):
        raise UnsupportedError(
            f"the eigenbasis [{size}, {size}] that {state.kind} holds is not orthonormal: "
            f"Q^T Q differs from I by {residual:.3g}"
        )
    return checked


def _identity(state: ParameterState, size: int) -> Tensor:
    needed = 8 * size**2
    device = state.parameter.device
    if needed > available_bytes(device) // 2:
        raise UnsupportedError(
            f"a side of {size} without a basis is the identity, which would take "
            f"{needed / 1e9:.1f} GB; do not measure this layer"
        )
    return _eye(size, device)


def _eye(size: int, device: torch.device) -> Tensor:
    return torch.eye(size, dtype=torch.float64, device=device)
