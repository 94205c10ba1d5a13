"""What a batch, and what a model makes of it, must be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeGuard

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.gradients.layers.base import all_finite
from kronecker_probe.gradients.tracing.record import Recording

Pair = tuple[Tensor, Tensor]


def several_pairs(data: object) -> TypeGuard[Iterable[Pair]]:
    """Whether the examples are several pairs, and not one."""
    if isinstance(data, (Tensor, Mapping, str, bytes)):
        return False
    if isinstance(data, (tuple, list)):
        return bool(data) and all(isinstance(one, (tuple, list)) and len(one) == 2 for one in data)
    return isinstance(data, Iterable) or hasattr(data, "__getitem__")


def check_batch(batch: object) -> Pair:
    """Inputs and targets of one batch.

    Raises:
        InvalidInputError: Not a pair of tensors with the same, positive number of examples.
    """
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else None
    if isinstance(first, (tuple, list)) and len(first) != 2:
        raise InvalidInputError(
            f"data is a {type(batch).__name__} whose first item has {len(first)} parts; give "
            "pairs (inputs, targets) of tensors."
        )
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        parts = f" of {len(batch)} parts" if isinstance(batch, (tuple, list)) else ""
        raise InvalidInputError(
            f"data is a {type(batch).__name__}{parts}; give a pair (inputs, targets) of tensors, "
            "or an iterable of such pairs."
        )
    inputs, targets = batch
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
        raise InvalidInputError(
            f"data holds {type(inputs).__name__} and {type(targets).__name__}; "
            "inputs and targets must be tensors (wrap a model with other arguments)."
        )
    if targets.ndim == 0 or inputs.ndim == 0 or len(inputs) != len(targets):
        raise InvalidInputError(
            f"inputs {list(inputs.shape)} and targets {list(targets.shape)} must have the same "
            "number of examples in their first dimension."
        )
    if len(targets) == 0:
        raise InvalidInputError("The batch is empty; give at least one example.")
    return inputs, targets


def check_outputs(outputs: object, n_examples: int) -> Tensor:
    """What the model returned, if it can be measured.

    Raises:
        InvalidInputError: Not a tensor with the examples in front, or without a gradient.
    """
    if not isinstance(outputs, Tensor):
        raise InvalidInputError(
            f"The model returned a {type(outputs).__name__}; wrap it so that it returns the "
            "tensor of outputs (logits) alone."
        )
    if outputs.ndim == 0 or outputs.shape[0] != n_examples:
        raise InvalidInputError(
            f"The model returned {list(outputs.shape)} for {n_examples} examples; the first "
            "dimension must be the batch (do not flatten positions into it)."
        )
    if not outputs.requires_grad:
        raise InvalidInputError(
            "The outputs depend on no parameter that requires a gradient: everything is frozen, "
            "or the forward pass runs under torch.no_grad()."
        )
    return outputs


def origin_of_nan(inputs: Tensor, parameters: Mapping[str, Tensor], record: Recording) -> str:
    """Where NaN or infinity in the outputs come from, as far back as is known."""
    if not all_finite(inputs):
        bad = int((~torch.isfinite(inputs)).sum())
        return f"The inputs of the batch hold {bad} NaN or infinite values; remove those examples."
    if broken := not_finite(parameters):
        return broken
    for call in record.calls:
        call.check()
    return (
        "The model's outputs hold NaN or infinite values, from finite inputs and parameters; "
        "check the last layers, and the range of half precision."
    )


def not_finite(parameters: Mapping[str, Tensor]) -> str:
    """Which parameter is not finite; empty if all are."""
    for name, parameter in parameters.items():
        if not all_finite(parameter.detach()):
            return f"Parameter {name!r} holds NaN or infinite values; go back to a checkpoint."
    return ""
