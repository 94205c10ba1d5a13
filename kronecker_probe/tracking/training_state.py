"""What a checkpoint of a training holds, as a typed model, and whether it fits a training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.optim import KroneckerOptimizer
from kronecker_probe.tracking.run_directory.checkpoint import load_checkpoint
from kronecker_probe.tracking.run_directory.files import shown

_Count = Annotated[int, Field(ge=0, lt=2**48)]
_STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


class Logged(BaseModel):
    """A number that was logged and that no part holds yet."""

    model_config = _STRICT

    step: _Count
    metric: str
    value: float


class TrackerState(BaseModel):
    """Of :meth:`Tracker.state_dict`; ``window`` is checked by the window that loads it."""

    model_config = _STRICT

    steps_taken: _Count
    logged: list[Logged]
    window: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As the tracker takes it."""
        window = {} if self.window is None else {"window": self.window}
        logged = [dict(row) for row in self.logged]
        return {"steps_taken": self.steps_taken, "logged": logged, **window}


class OptimizerState(BaseModel):
    """Of an optimizer's ``state_dict``."""

    model_config = _STRICT

    state: dict[_Count, dict[str, Any]]
    param_groups: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """As the optimizer takes it."""
        return {"state": self.state, "param_groups": self.param_groups}


class TrainingState(BaseModel):
    """A checkpoint of a training.

    Attributes:
        model: Of the model's ``state_dict``.
        optimizer: Of its optimizer's.
        without_state: Indices of the parameters for which the optimizer holds no state; None in
            checkpoints from before it was recorded.
        tracker: Of its tracker's.
        generators: States of random generators by device type.
    """

    model_config = _STRICT

    model: dict[str, Tensor]
    optimizer: OptimizerState
    without_state: list[_Count] | None = None
    tracker: TrackerState
    generators: dict[str, Tensor]


def load_training_state(path: Path) -> TrainingState:
    """A checkpoint of a training.

    Raises:
        InvalidInputError: The file cannot be read, or is no such checkpoint; the message names
            file, field and value.
    """
    content = load_checkpoint(path)
    try:
        return TrainingState.model_validate(content)
    except ValidationError as error:
        told = "; ".join(
            f"{'.'.join(map(str, one['loc']))}: {one['msg']}"
            + ("" if one["type"] == "missing" else f", not {_short(one['input'])}")
            for one in error.errors(include_url=False)[:3]
        )
        raise InvalidInputError(f"{shown(path)} is no checkpoint of a run: {told}.") from error


def load_model(model: nn.Module, state: TrainingState, path: Path) -> None:
    """Put a checkpoint's weights into a model.

    Raises:
        InvalidInputError: The checkpoint is of another model.
    """
    where = f"The checkpoint {shown(path)} is of another model: "
    for name, own in model.state_dict().items():
        given = state.model.get(name)
        if given is not None and given.dtype != own.dtype:
            raise InvalidInputError(f"{where}{name} is of {given.dtype}, here of {own.dtype}.")
    try:
        model.load_state_dict(state.model)
    except RuntimeError as error:
        raise InvalidInputError(where + str(error)) from error


def without_state(optimizer: Mapping[str, Any]) -> list[int]:
    """The indices of the parameters for which an optimizer's state dict holds nothing."""
    indices = (index for group in optimizer["param_groups"] for index in group["params"])
    return [index for index in indices if not optimizer["state"].get(index)]


def check_optimizer(optimizer: Optimizer, state: TrainingState, model: nn.Module) -> None:
    """Refuse the state of another optimizer, of other options, or of another step.

    Args:
        optimizer: As it was built, before any step.
        state: The checkpoint.
        model: Whose parameters the optimizer holds, for messages.

    Raises:
        InvalidInputError: The message names parameter, key and value.
    """
    loaded = state.optimizer
    _check_groups(optimizer.state_dict()["param_groups"], loaded.param_groups)
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if beyond := sorted(loaded.state.keys() - set(range(len(held)))):
        raise InvalidInputError(
            f"it holds optimizer state of parameter {beyond[0]}, the model has {len(held)}."
        )
    missing = without_state(loaded.as_dict())
    if state.without_state is not None and missing != state.without_state:
        lost = sorted(set(missing) ^ set(state.without_state))[0]
        raise InvalidInputError(f"the optimizer state of {names.get(held[lost], lost)} is missing.")
    # the embedded optimizers check by themselves what they load
    expected = None if isinstance(optimizer, KroneckerOptimizer) else _expected(optimizer)
    steps = []
    for index, found in loaded.state.items():
        name = names.get(held[index], str(index))
        if expected is not None:
            _check_like(found, expected.get(index, {}), name)
        if "step" in found:
            steps.append(float(found["step"]))
            if not 0 <= steps[-1] <= state.tracker.steps_taken or steps[-1] % 1:
                raise InvalidInputError(
                    f"the optimizer counts {steps[-1]:g} steps of {name} after "
                    f"{state.tracker.steps_taken} steps of training."
                )
    skips = getattr(optimizer, "nonfinite", "raise") == "skip"
    if steps and max(steps) != state.tracker.steps_taken and not skips:
        raise InvalidInputError(
            f"the optimizer state is that of step {max(steps):g}, not of step "
            f"{state.tracker.steps_taken}."
        )


def _check_groups(own: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> None:
    if len(own) != len(loaded):
        raise InvalidInputError(
            f"it holds {len(loaded)} parameter groups, the optimizer has {len(own)}."
        )
    for number, (ours, theirs) in enumerate(zip(own, loaded, strict=True)):
        for key, value in theirs.items():
            if key not in ours or type(value) is not type(ours[key]) or value != ours[key]:
                here = _short(ours[key]) if key in ours else "absent"
                raise InvalidInputError(
                    f"option {key} of parameter group {number} is {_short(value)} in it, "
                    f"{here} now."
                )


def _expected(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """The state that the optimizer holds after a step: that of a copy, with gradients of zero."""
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    twin.step()
    state: dict[int, dict[str, Any]] = twin.state_dict()["state"]
    return state


def _check_like(found: Mapping[str, Any], expected: Mapping[str, Any], name: str) -> None:
    if found.keys() != expected.keys():
        raise InvalidInputError(
            f"the optimizer state of {name} has the keys {', '.join(found) or 'none'}; expected: "
            f"{', '.join(expected) or 'none'}."
        )
    for key, like in expected.items():
        if _kind(found[key]) != _kind(like):
            raise InvalidInputError(
                f"{key} in the optimizer state of {name} is {_kind(found[key])}; expected: "
                f"{_kind(like)}."
            )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} of {value.dtype}"
    return type(value).__name__


def check_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Refuse states that are none of a random generator.

    Raises:
        InvalidInputError: One is missing or malformed.
    """
    for name in {"cpu", device.type} & {"cpu", "cuda"}:
        if name not in states:
            raise InvalidInputError(f"generators.{name} is missing.")
        try:
            torch.Generator(device if name == "cuda" else "cpu").set_state(states[name])
        except (RuntimeError, TypeError) as error:
            raise InvalidInputError(
                f"generators.{name} = {_kind(states[name])} is no state of a generator: {error}."
            ) from error


def _short(value: object) -> str:
    text = _kind(value) if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
