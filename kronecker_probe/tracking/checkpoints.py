"""The checkpoints of a training: writing them, deleting older ones, going back to the last."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.tracking.run_directory.checkpoint import save_checkpoint
from kronecker_probe.tracking.run_directory.files import make_directory, refuse_links, shown
from kronecker_probe.tracking.run_directory.store import RunStore
from kronecker_probe.tracking.tracker import Tracker
from kronecker_probe.tracking.training_state import (
    TrainingState,
    check_generators,
    check_optimizer,
    load_model,
    load_training_state,
    without_state,
)


@final
class Checkpoints:
    """The states of a training at its probed steps, in its run directory.

    Args:
        store: The run directory.
        model: What is trained, on the device of the training.
        optimizer: Its optimizer.
        tracker: What measures it.
        keep_all: Keep a checkpoint at every probed step, not only the last.
    """

    def __init__(
        self,
        store: RunStore,
        model: nn.Module,
        optimizer: Optimizer,
        tracker: Tracker,
        *,
        keep_all: bool,
    ) -> None:
        self._store = store
        self._model = model
        self._optimizer = optimizer
        self._tracker = tracker
        self._keep_all = keep_all
        # A run killed in a probe leaves two; with more, somebody asked for all: those stay.
        found = self._by_step()
        self._kept = set(found.values() if len(found) > 2 else ())

    def _by_step(self) -> dict[int, Path]:
        """The checkpoints by step, the last first."""
        found = {
            int(path.stem.removeprefix("step-")): path
            for path in self._store.checkpoints.glob("step-*.safetensors")
            if path.stem.removeprefix("step-").isdecimal()
        }
        return dict(sorted(found.items(), reverse=True))

    @contextmanager
    def around(self) -> Iterator[None]:
        """Store the state before the block; older ones go only when the block is done.

        Before the block, because a forward pass moves generators and batch statistics.
        """
        path = self._store.checkpoint_path(self._tracker.steps_taken)
        make_directory(path.parent, inside=self._store.path)  # a run killed at its start lacks it
        save_checkpoint(path, self._state())
        yield
        if not self._keep_all:
            for other in set(self._by_step().values()) - self._kept - {path}:
                refuse_links(other, self._store.path)
                if other.is_file():
                    other.unlink(missing_ok=True)

    def _state(self) -> dict[str, Any]:
        optimizer = self._optimizer.state_dict()
        return {
            "model": dict(self._model.state_dict()),
            "optimizer": optimizer,
            "without_state": without_state(optimizer),
            "tracker": self._tracker.state_dict(),
            "generators": _generators(self._device()),
        }

    def _device(self) -> torch.device:
        return next((p.device for p in self._model.parameters()), torch.device("cpu"))

    def restore(self, probed: Sequence[int], steps: int) -> None:
        """Go back to the last checkpoint that lets every missing step be measured, or to step 0.

        One that is damaged, or does not fit the training, is passed over with a warning.

        Args:
            probed: The steps to probe.
            steps: Those of the whole training.

        Raises:
            InvalidInputError: The checkpoint is of another model.
        """
        stored = self._store.steps()
        missing = [step for step in probed if step not in stored]
        fresh = copy.deepcopy((self._model.state_dict(), self._optimizer.state_dict()))
        for step, path in self._by_step().items():
            if missing and step > missing[0]:
                continue
            try:
                state = load_training_state(path)
            except InvalidInputError as error:
                _warn(f"{error} Going on from an earlier one.")
                continue
            load_model(self._model, state, path)
            try:
                self._load(state, step)
            except InvalidInputError as error:
                self._model.load_state_dict(fresh[0])
                self._optimizer.load_state_dict(fresh[1])
                _warn(
                    f"The checkpoint {shown(path)} does not fit the run: {error} Going on from an "
                    "earlier one."
                )
                continue
            return
        if stored:
            _warn(
                f"No checkpoint from before step {missing[0] if missing else steps}, "
                "which is to be measured: training again from step 0. Stored steps are kept."
            )

    def _load(self, state: TrainingState, step: int) -> None:
        """Put back optimizer, tracker and generators.

        Raises:
            InvalidInputError: They are not those of this training after ``step`` steps.
        """
        if state.tracker.steps_taken != step:
            raise InvalidInputError(
                f"tracker.steps_taken = {state.tracker.steps_taken} in the file of step {step}."
            )
        check_optimizer(self._optimizer, state, self._model)
        device = self._device()
        check_generators(state.generators, device)
        try:
            self._optimizer.load_state_dict(state.optimizer.as_dict())
            self._tracker.load_state_dict(state.tracker.as_dict())
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise InvalidInputError(f"{type(error).__name__}: {error}") from error
        torch.set_rng_state(state.generators["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state.generators["cuda"], device)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, 5)


def _generators(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states
