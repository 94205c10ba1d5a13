"""What an optimizer really holds at this step, as an operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from kronecker_probe.errors import InvalidInputError, UnsupportedError
from kronecker_probe.operators.base import Operator
from kronecker_probe.tracking.optimizer_state import elementwise, muon, soap
from kronecker_probe.tracking.optimizer_state.reader import Held, find_held, runs_step_of

_Reader = Callable[[Held], Operator]

# AdamW runs Adam's step, so that Adam stands for both.
_READERS: dict[str, _Reader] = {
    "Adam": elementwise.adam,
    "AdamW": elementwise.adam,
    "NAdam": elementwise.nadam,
    "RMSprop": elementwise.rmsprop,
    "Adagrad": elementwise.adagrad,
    "Muon": muon.muon,
}


def operator_in_use(optimizer: Optimizer, parameter: Tensor) -> Operator:
    """The P of direction = P^(-1/2) M that the optimizer holds now: stale, damped, bias-corrected.

    It is that of the last step taken. M is what the step preconditions (the first moment,
    bias-corrected, or the gradient), and the direction is that before the learning rate, weight
    decay, grafting and any clipping or normalization of the update. Read are, in this order:

    - an optimizer with a method ``operator(parameter)``, as the embedded ones have;
    - ``torch.optim.Adam``, ``AdamW``, ``NAdam``, ``RMSprop``, ``Adagrad`` and ``Muon``, and
      classes derived from them that keep their ``step``;
    - SOAP, by its state: that of the authors and of pytorch_optimizer ("Q", "exp_avg_sq"), and
      that of Emerging-Optimizers (the same, or "Q_L", "Q_R", "exp_avg_sq").

    Args:
        optimizer: Not a wrapper around another one.
        parameter: Seen as an m x n matrix, first dimension x the rest.

    Raises:
        UnsupportedError: There is none, and the message says why: before the first step or
            refresh, a parameter that the optimizer does not hold or holds in shards, a state that
            is not finite or of another shape, or an optimizer that is not known.
    """
    method = getattr(optimizer, "operator", None)
    if method is not None:
        return _own_operator(optimizer, method, parameter)
    try:
        return _reader(optimizer, parameter)(find_held(optimizer, parameter))
    except UnsupportedError:
        raise
    except Exception as error:  # a state that nobody foresaw must not end the training
        raise UnsupportedError(
            f"the state of {type(optimizer).__name__} could not be read: "
            f"{type(error).__name__}: {error}"
        ) from error


def _own_operator(
    optimizer: Optimizer, method: Callable[[Tensor], Operator], parameter: Tensor
) -> Operator:
    try:
        operator = method(parameter)
    except InvalidInputError as error:
        raise UnsupportedError(str(error)) from error
    except Exception as error:  # somebody else's optimizer must not end the training
        raise UnsupportedError(
            f"{type(optimizer).__name__}.operator failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(operator, Operator):
        raise UnsupportedError(
            f"{type(optimizer).__name__}.operator returned a {type(operator).__name__}, "
            "not an operator"
        )
    return operator


def _reader(optimizer: Optimizer, parameter: Tensor) -> _Reader:
    for name, reader in _READERS.items():
        known = getattr(torch.optim, name, None)  # Muon is there from torch 2.9
        if known is not None and runs_step_of(optimizer, known):
            return reader
    kind = type(optimizer).__name__
    for attribute in ("optimizer", "optim", "base_optimizer"):
        inner = getattr(optimizer, attribute, None)
        if isinstance(inner, Optimizer):
            raise UnsupportedError(
                f"{kind} has no operator(parameter): it wraps a {type(inner).__name__}; give "
                f"that one (its .{attribute}) to the tracker"
            )
    if soap.looks_like(optimizer, parameter):
        return soap.soap
    raise UnsupportedError(
        f"{kind} has no operator(parameter) to read its state from, and is none of "
        f"torch.optim.{', '.join(_READERS)} or SOAP"
    )
