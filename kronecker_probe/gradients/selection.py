"""Which parameters of a model are asked for and have a rule, and why the others are left out."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from kronecker_probe.errors import InvalidInputError, unknown_name
from kronecker_probe.gradients.layers import rule_for
from kronecker_probe.gradients.recording import Owner

Holders = list[tuple[str, str, nn.Module]]  # module name, local parameter name, module


def select(
    model: nn.Module, layers: str | Sequence[str]
) -> tuple[dict[str, list[Owner]], dict[str, str]]:
    """Owners of the parameters to measure, and the reasons for all others.

    Args:
        model: The model.
        layers: Glob, or several, of parameter names.

    Raises:
        UnknownNameError: A glob that matches nothing.
        InvalidInputError: The model has no parameters, or some that are not initialized.
    """
    parameters = dict(model.named_parameters())
    if not parameters:
        raise InvalidInputError(f"The model {type(model).__name__} has no parameters to measure.")
    patterns = [layers] if isinstance(layers, str) else list(layers)
    if not patterns:
        raise InvalidInputError("layers is empty; give a glob of parameter names, or '*' for all.")
    for pattern in patterns:
        if not fnmatch.filter(parameters, pattern):
            raise unknown_name("layers pattern (no parameter matches)", pattern, parameters)
    holders: dict[int, Holders] = {}
    for module_name, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module_name, local, module))
    owners: dict[str, list[Owner]] = {}
    skipped: dict[str, str] = {}
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise InvalidInputError(
                f"Parameter {name!r} is not initialized yet; run the model once on a batch."
            )
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            skipped[name] = f"not selected by layers={layers!r}"
        elif reason := _unmeasured(parameter) or _refusal(holders.get(id(parameter), [])):
            skipped[name] = reason
        else:
            owners[name] = _owners(parameter, holders.get(id(parameter), []))
    return owners, skipped


def _unmeasured(parameter: nn.Parameter) -> str:
    if not parameter.requires_grad:
        return "frozen (requires_grad=False)"
    return f"{parameter.dtype} is not real" if parameter.is_complex() else ""


def _refusal(holders: Holders) -> str:
    """Why one of the modules that hold a parameter has no exact treatment; empty if all have."""
    for module_name, local, module in holders:
        rule = rule_for(module)
        if rule is None:
            where = module_name or "the model itself"
            return f"no rule for {type(module).__name__} ({where}); Linear and Conv2d have one"
        if local != "weight":
            return f"a {local} of {type(module).__name__}: only weights are measured"
        if refusal := rule.refusal(module):
            return refusal
    return ""


def _owners(parameter: nn.Parameter, holders: Holders) -> list[Owner]:
    return [
        Owner(name or type(module).__name__, module, parameter, rule)
        for name, _, module in holders
        if (rule := rule_for(module)) is not None
    ]
