"""What an optimizer really holds at this step, as an operator."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from kronecker_probe.errors import InvalidInputError, UnsupportedError
from kronecker_probe.operators.base import Operator


def live_operator(optimizer: Optimizer, parameter: Tensor) -> Operator:
    """The P whose power the optimizer applies now: stale, damped, bias-corrected.

    Any optimizer with a method ``operator(parameter)`` can be read; the embedded ones have it.

    Raises:
        UnsupportedError: There is none, and the message says why: before the first refresh, for
            a parameter that the optimizer does not hold, or for an optimizer without
            ``operator``.
    """
    method = getattr(optimizer, "operator", None)
    if method is None:
        raise UnsupportedError(
            f"{type(optimizer).__name__} has no operator(parameter) to read its state from"
        )
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
