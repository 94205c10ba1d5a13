"""The preconditioner that an optimizer has in use, as an operator, and rows about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from kronecker_probe.errors import InvalidInputError, UnsupportedError
from kronecker_probe.gradients.samples.base import GradientSamples
from kronecker_probe.operators.base import Operator
from kronecker_probe.optim import KroneckerOptimizer
from kronecker_probe.quality.rows import Row, absent_row

# the readers of torch's optimizers and of SOAP register themselves
from kronecker_probe.tracking.optimizer_state import elementwise, muon, soap  # noqa: F401
from kronecker_probe.tracking.optimizer_state.factors import inside_rows
from kronecker_probe.tracking.optimizer_state.registry import find_reader


def operator_in_use(optimizer: Any, parameter: Tensor) -> Operator:
    """The P of direction = P^(-1/2) M that the optimizer holds now: stale, damped, bias-corrected.

    It is that of the last step taken. M is what the step preconditions (the first moment,
    bias-corrected, or the gradient), and the direction is that before the learning rate, weight
    decay, grafting and any clipping or normalization of the update. Read are, in this order:

    - an optimizer with a method ``operator(parameter)``, as the embedded ones have;
    - those with a registered reader (:func:`kronecker_probe.register_optimizer_state`):
      ``torch.optim.Adam``, ``AdamW``, ``NAdam``, ``RMSprop``, ``Adagrad`` and ``Muon``, classes
      derived from them that keep their ``step``, and the user's own;
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
    kind = type(optimizer).__name__
    method = getattr(optimizer, "operator", None)
    try:
        read = method or partial(find_reader(optimizer, parameter), optimizer)
        operator = read(parameter)
    except UnsupportedError:
        raise
    except InvalidInputError as error:
        raise UnsupportedError(str(error)) from error
    except Exception as error:  # a state that nobody foresaw must not end the training
        raise UnsupportedError(
            f"the state of {kind} could not be read: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(operator, Operator):
        raise UnsupportedError(
            f"the reader of {kind} returned a {type(operator).__name__}, not an operator"
        )
    return operator


def read_state(
    optimizers: Sequence[Optimizer],
    parameters: Mapping[str, Tensor],
    samples: Mapping[str, GradientSamples],
) -> tuple[dict[str, dict[str, Operator]], list[Row]]:
    """What the optimizers hold for each measured parameter.

    Args:
        optimizers: Each parameter is that of the first one whose groups have it.
        parameters: All parameters of the model, by name.
        samples: The gradient samples of the measured ones.

    Returns:
        The operators, by parameter and as "in-use"; and rows beside them: which rule an operator
        follows, why there is none, how its factors are.
    """
    found: dict[str, dict[str, Operator]] = {}
    rows: list[Row] = []
    for name, one in samples.items():
        parameter = parameters[name]
        optimizer = _holder(optimizers, parameter)
        if optimizer is None:
            rows.append(absent_row(name, "in-use", "no optimizer of the tracker's holds it"))
            continue
        try:
            operator = operator_in_use(optimizer, parameter)
            if operator.shape != one.shape:
                raise UnsupportedError(
                    f"the optimizer sees {operator.shape}, the layer is {one.shape}"
                )
            found[name] = {"in-use": operator}
            rows += _rule_rows(optimizer, name, parameter)
        except UnsupportedError as error:
            rows.append(absent_row(name, "in-use", str(error)))
        rows += inside_rows(optimizer, name, parameter, one)
    return found, rows


def _rule_rows(optimizer: Optimizer, name: str, parameter: Tensor) -> list[Row]:
    """The rule that the operator in use follows, its block size and its epsilon; ours alone."""
    if not isinstance(optimizer, KroneckerOptimizer):
        return []
    found = optimizer.inspect(parameter)
    about: Row = {
        "rule": found.rule, "block_size": found.block_size, "epsilon": found.epsilon
    }  # fmt: skip
    if found.rule is None and found.block_size is None:
        return []
    return [{"parameter": name, "metric": "in_use_rule", "value": math.nan, **about}]


def _holder(optimizers: Sequence[Optimizer], parameter: Tensor) -> Optimizer | None:
    """The one whose groups have the parameter, or that has no groups to tell by."""
    for one in optimizers:
        groups = getattr(one, "param_groups", None)
        if groups is None or any(parameter is held for group in groups for held in group["params"]):
            return one
    return None
