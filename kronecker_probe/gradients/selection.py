"""Which parameters of a model are asked for, and why the others are left out."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from kronecker_probe.errors import InvalidInputError, unknown_name
from kronecker_probe.table.codes import Reason, ReasonCode

# Weight and bias of one matrix product, by their local names.
_PAIRS = (("weight", "bias"), ("in_proj_weight", "in_proj_bias"))


def matching(names: Iterable[str], layers: str | Sequence[str]) -> set[str]:
    """The names that are one of ``layers``, or match one of them as a glob.

    Raises:
        UnknownNameError: One that matches nothing.
        InvalidInputError: No string or strings, or none at all.
    """
    known = list(names)
    given = [layers] if isinstance(layers, str) else layers
    if not isinstance(given, Iterable) or not all(isinstance(one, str) for one in given):
        raise InvalidInputError(f"layers={layers!r}; give a glob of parameter names, or several.")
    patterns = list(given)
    if not patterns:
        raise InvalidInputError("layers is empty; give a glob of parameter names, or '*' for all.")
    found: set[str] = set()
    for pattern in patterns:
        # a name may hold brackets, which a glob would read as a choice of characters
        matched = {name for name in known if name == pattern or fnmatch.fnmatchcase(name, pattern)}
        if not matched:
            raise unknown_name("layers pattern (no parameter matches)", pattern, known)
        found |= matched
    return found


def select(
    model: nn.Module, layers: str | Sequence[str]
) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """The parameters to measure, and the reasons for all others.

    Raises:
        UnknownNameError: A glob that matches nothing.
        InvalidInputError: The model has no parameters, or some that are not initialized or that
            were made under torch.inference_mode(); or ``layers`` are no strings.
    """
    parameters = dict(model.named_parameters())
    if not parameters:
        raise InvalidInputError(f"The model {type(model).__name__} has no parameters to measure.")
    matched = matching(parameters, layers)
    chosen: dict[str, nn.Parameter] = {}
    skipped: dict[str, str] = {}
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise InvalidInputError(
                f"Parameter {name!r} is not initialized yet; run the model once on a batch."
            )
        if parameter.is_inference():
            raise InvalidInputError(
                f"Parameter {name!r} was made under torch.inference_mode(), which gives it no "
                "gradient; make the model outside of it."
            )
        if name not in matched:
            why = f"not selected by layers={layers!r}"
            skipped[name] = Reason(why, ReasonCode.NOT_SELECTED)
        elif reason := _unmeasured(parameter):
            skipped[name] = reason
        else:
            chosen[name] = parameter
    return chosen, skipped


def _unmeasured(parameter: nn.Parameter) -> str:
    if not parameter.requires_grad:
        return Reason("frozen (requires_grad=False)", ReasonCode.FROZEN)
    if parameter.is_complex():
        return f"{parameter.dtype} is not real"
    return "" if parameter.numel() else "it has no entries"


def pairs(parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Weight to bias, for every module that has both among ``parameters``."""
    found = {}
    for name, weight in parameters.items():
        module, _, local = name.rpartition(".")
        for weight_name, bias_name in _PAIRS:
            other = f"{module}.{bias_name}" if module else bias_name
            bias = parameters.get(other)
            matrix = local == weight_name and weight.ndim > 1
            if matrix and bias is not None and bias.shape == weight.shape[:1]:
                found[name] = other
    return found
