"""Optimizers by name, with settings as text: what the command line builds."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from kronecker_probe.errors import InvalidInputError, unknown_name
from kronecker_probe.optim.kfac import MODEL_PRESETS
from kronecker_probe.optim.options.sections import SECTIONS
from kronecker_probe.optim.param_groups import hidden_groups
from kronecker_probe.optim.presets import PRESETS

TORCH: MappingProxyType[str, Callable[..., Optimizer]] = MappingProxyType(
    {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "sgd": torch.optim.SGD,
        "rmsprop": torch.optim.RMSprop,
        "adagrad": torch.optim.Adagrad,
    }
)
"""Optimizers of torch that can be tracked by name."""

# Their steps have the length of Adam's, so that a rate that suits one suits all.
LIKE_ADAM = frozenset(
    {"shampoo", "shampoo-squared", "eshampoo", "soap", "kl-soap", "adamw", "adam"}
)


# As they are written elsewhere too: "false" is a text, and true, to Python.
_CONSTANTS = {"true": True, "false": False}
# What is passed by itself.
_RESERVED = ("params", "model")


def optimizer_names() -> tuple[str, ...]:
    """All that :func:`build_optimizer` knows."""
    return (*PRESETS, *MODEL_PRESETS, *TORCH)


def build_optimizer(
    name: str,
    params: ParamsT,
    lr: float | None = None,
    settings: Sequence[str] = (),
    model: nn.Module | None = None,
) -> Optimizer:
    """An optimizer by its name.

    Args:
        name: A preset ("soap", "shampoo-squared", ...), or one of torch's ("adamw", "sgd", ...).
        params: Parameters, named parameters or groups.
        lr: Learning rate; None for the optimizer's own default.
        settings: "option=value", or "section.field=value" of a preset, such as
            "basis.tolerance=0.1"; values as in Python, names of choices without quotes.
        model: For "kfac" and "ekfac", which hook its layers, and "muon", which takes its hidden
            matrices and has Adam for the rest; all three take its parameters, not ``params``.

    Raises:
        UnknownNameError: No such optimizer, option, section or field.
        InvalidInputError: A malformed setting, one given twice, a value out of range, or no
            model where one is needed.
    """
    known = {**PRESETS, **MODEL_PRESETS, **TORCH}
    if name not in known:
        raise unknown_name("optimizer", name, known)
    options = read_settings(settings, name not in TORCH)
    if lr is not None:
        if "lr" in options:
            raise InvalidInputError(
                "lr is no setting where the learning rate is an option of its own: use --lr (lr=), "
                f"or --set {name}:lr=X on the command line."
            )
        options["lr"] = lr
    if name in MODEL_PRESETS:
        if model is None:
            raise InvalidInputError(f"{name} hooks the layers of a model; pass model=.")
        return MODEL_PRESETS[name](model, **options)
    if name in TORCH:
        return _torch(name, params, options)
    if name == "muon" and model is not None:
        params = hidden_groups(model)
    return known[name](params, **options)


def learning_rates(optimizer: Optimizer) -> list[float]:
    """Those of its groups in their order, each once."""
    return list(dict.fromkeys(float(group["lr"]) for group in optimizer.param_groups))


def settings_for(
    name: str, settings: Sequence[str], names: Sequence[str]
) -> tuple[float | None, tuple[str, ...]]:
    """What of the settings of several optimizers is for one of them.

    Args:
        name: That one.
        settings: "option=value" for all, "NAME:option=value" for NAME alone.
        names: All optimizers.

    Returns:
        The learning rate, of "NAME:lr=X", or None; and the other settings, without prefixes. One
        that is for ``name`` alone takes the place of the same one for all.

    Raises:
        UnknownNameError: A prefix that is none of ``names``.
        InvalidInputError: A learning rate that is no number of at least 0, or given twice.
    """
    shared: list[str] = []
    own: list[str] = []
    for text in settings:
        prefix, colon, _ = text.partition("=")[0].partition(":")
        if not colon:
            shared.append(text)
        elif prefix.strip() not in names:
            raise unknown_name("optimizer of this call", prefix.strip(), names)
        elif prefix.strip() == name:
            own.append(text.partition(":")[2].strip())
    rates = [text for text in own if _path(text) == "lr"]
    if len(rates) > 1:
        raise InvalidInputError(f"Setting '{name}:lr' is given twice.")
    replaced = {_path(text) for text in own}
    kept = [text for text in shared if _path(text) not in replaced]
    rest_of_own = [text for text in own if text not in rates]
    return _rate(name, rates), (*kept, *rest_of_own)


def _path(setting: str) -> str:
    return setting.partition("=")[0].strip()


def _rate(name: str, settings: Sequence[str]) -> float | None:
    """The learning rate of at most one setting "lr=X"."""
    for text in settings:
        value = _value(text.partition("=")[2].strip())
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise InvalidInputError(
                f"{name}:lr is {value!r}; give a number of at least 0, as in {name}:lr=3e-3."
            )
        return float(value)
    return None


def _torch(name: str, params: ParamsT, options: dict[str, Any]) -> Optimizer:
    """One of torch's, whose own checks are few."""
    found = inspect.signature(TORCH[name]).parameters
    accepted = {key: one.default for key, one in found.items() if key not in ("self", "params")}
    for key, value in options.items():
        if key not in accepted:
            raise unknown_name(f"option of {name}", key, accepted)
        flag = isinstance(accepted[key], bool)
        if isinstance(value, str) or (flag and not isinstance(value, bool)):
            kind = "True or False" if flag else "a number, True, False or None"
            raise InvalidInputError(f"{key} of {name} is {value!r}; give {kind}.")
    try:
        return TORCH[name](params, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"torch's {name} refuses {options}: {error}") from error


def read_settings(settings: Sequence[str], sections: bool) -> dict[str, Any]:
    """Settings as the keywords of an optimizer.

    Args:
        settings: The texts.
        sections: Whether the optimizer has sections.

    Raises:
        UnknownNameError: No such section or field.
        InvalidInputError: A malformed setting, or one given twice.
    """
    found: dict[str, Any] = {}
    for text in settings:
        path, equals, value = text.partition("=")
        section, dot, field = path.strip().partition(".")
        if not equals or not section or (dot and not field) or section in _RESERVED:
            raise InvalidInputError(
                f"Setting {text!r} is none; write option=value or section.field=value, for "
                "example basis.tolerance=0.1."
            )
        if dot and not sections:
            raise InvalidInputError(
                f"Setting {text!r} has a section; torch's optimizers have none."
            )
        if dot and section not in SECTIONS:
            raise unknown_name("section", section, SECTIONS)
        place = found.setdefault(section, {}) if dot else found
        key = field if dot else section
        if key in place:
            raise InvalidInputError(f"Setting {path.strip()!r} is given twice.")
        place[key] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    """A Python literal, or the text itself: a name of a choice."""
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
