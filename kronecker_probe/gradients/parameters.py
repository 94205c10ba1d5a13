"""The parameters of a model or an optimizer, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from kronecker_probe.errors import InvalidInputError, UnsupportedError
from kronecker_probe.gradients.selection import matching

Parameters = (
    nn.Module | Optimizer | Mapping[str, Tensor] | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
)


def _named(parameters: Parameters) -> dict[str, Tensor]:
    """Parameters by name; those without one are numbered."""
    if isinstance(parameters, nn.Module):
        return dict(parameters.named_parameters())
    if isinstance(parameters, Mapping):
        return dict(parameters)
    if isinstance(parameters, Optimizer):
        pairs: list[Any] = []
        for group in parameters.param_groups:
            pairs += (
                zip(group["param_names"], group["params"], strict=True)
                if ("param_names" in group)
                else group["params"]
            )
    else:
        pairs = list(parameters)
    named: dict[str, Tensor] = {}
    for number, one in enumerate(pairs):
        name, parameter = (str(number), one) if isinstance(one, Tensor) else one
        if name in named:
            raise InvalidInputError(f"Two parameters have the name {name!r}; rename one.")
        named[name] = parameter
    return named


def chosen_parameters(
    parameters: Parameters, layers: str | Sequence[str]
) -> dict[str, nn.Parameter]:
    """Those that require a gradient and match ``layers``, by name.

    Args:
        parameters: A model, an optimizer, named parameters or parameters.
        layers: Glob, or several, of names; parameters without a name are numbered from 0.

    Raises:
        InvalidInputError: None is left, two have one name, or one is not initialized.
        UnknownNameError: A glob that matches nothing.
        UnsupportedError: A parameter that is not real floating point.
    """
    named = _named(parameters)
    matched = matching(named, layers) if named else set()
    chosen: dict[str, nn.Parameter] = {}
    for name, parameter in named.items():
        if name not in matched:
            continue
        if not isinstance(parameter, Tensor):
            raise InvalidInputError(f"{name!r} is a {type(parameter).__name__}, no parameter.")
        if is_lazy(parameter):
            raise InvalidInputError(
                f"Parameter {name!r} is not initialized yet; run the model once on a batch."
            )
        if not parameter.requires_grad or parameter.numel() == 0:
            continue
        if not parameter.is_floating_point():
            raise UnsupportedError(f"{name!r} is {parameter.dtype}; leave it out by layers=.")
        chosen[name] = parameter  # type: ignore[assignment]
    if not chosen:
        raise InvalidInputError(
            "There is no parameter to record: none that requires a gradient was given or selected."
        )
    return chosen
