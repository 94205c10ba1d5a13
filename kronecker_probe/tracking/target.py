"""The second moment H that a tracker scores: of a batch, or of the run's own gradients."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from kronecker_probe.errors import InvalidInputError, unknown_name
from kronecker_probe.gradients.api import capture
from kronecker_probe.gradients.batch_means import BATCH_GRADIENT, batch_gradients
from kronecker_probe.gradients.coverage import Capture
from kronecker_probe.gradients.losses import LossFunction, resolve_loss
from kronecker_probe.gradients.samples.checks import check_count
from kronecker_probe.gradients.targets import CAPTURE_TARGETS, check_target
from kronecker_probe.gradients.tracing.isolation import isolated
from kronecker_probe.gradients.trajectory.truncation import truncate
from kronecker_probe.gradients.trajectory.window import GradientWindow
from kronecker_probe.table.codes import Reason, ReasonCode

Pair = tuple[Tensor, Tensor]

TRAJECTORY = "trajectory"
TARGETS = (*CAPTURE_TARGETS, BATCH_GRADIENT, TRAJECTORY)
DEFAULT_WINDOW = 200
DEFAULT_TOLERANCE = 1e-3


@final
@dataclass(frozen=True)
class TargetOptions:
    """Which target, and the options that belong to it alone.

    Attributes:
        target: One of :data:`TARGETS`.
        label_draws: Label samples per example, for "fisher".
        target_batch_size: Examples per batch, for "batch-gradient".
        window: Gradients to keep, for "trajectory"; None for 200.
        decay: Of the gradients' average, for "trajectory"; None for a sum.
        window_memory: Largest size of the window, for "trajectory"; None for "1GB".
        window_tolerance: Share of the gradients' energy that truncation may leave out, for
            "trajectory"; None for 1e-3, which moves cosines by less than that; 0 for exact.
    """

    target: str = "ggn"
    label_draws: int = 1
    target_batch_size: int | None = None
    window: int | None = None
    decay: float | None = None
    window_memory: str | int | None = None
    window_tolerance: float | None = None

    def check(self) -> None:
        """Refuse an unknown target, and options of another one.

        Raises:
            UnknownNameError: No such target.
            InvalidInputError: An option is missing, out of range or without effect.
        """
        if self.target not in TARGETS:
            raise unknown_name("target", self.target, TARGETS)
        check_target(
            self.target if self.target in CAPTURE_TARGETS else CAPTURE_TARGETS[0], self.label_draws
        )
        if (self.target_batch_size is not None) != (self.target == BATCH_GRADIENT):
            raise InvalidInputError(
                f"target_batch_size={self.target_batch_size} with target={self.target!r}: "
                f"{BATCH_GRADIENT!r} needs it, and nothing else takes it."
            )
        if self.target_batch_size is not None:
            check_count("target_batch_size", self.target_batch_size)
        for option in ("window", "decay", "window_memory", "window_tolerance"):
            value = getattr(self, option)
            if value is not None and self.target != TRAJECTORY:
                raise InvalidInputError(
                    f"{option}={value!r} with target={self.target!r}: only {TRAJECTORY!r} takes it."
                )
        if self.window_tolerance is not None and not 0 <= self.window_tolerance < 1:
            raise InvalidInputError(
                f"window_tolerance={self.window_tolerance!r}; give a share of at least 0, below 1."
            )

    def record(self) -> dict[str, Any]:
        """What run.json keeps: the target, and every option that differs from its default."""
        plain = TargetOptions()
        changed = {key: value for key, value in vars(self).items() if value != getattr(plain, key)}
        return {"target": self.target, **changed}


class Target(abc.ABC):
    """Makes the gradient samples of a probed step.

    Attributes:
        needs_data: Whether :meth:`samples` needs a batch.
    """

    needs_data: ClassVar[bool]

    def update(self) -> None:
        """Take in the gradients of a step, probed or not."""
        return

    @abc.abstractmethod
    def samples(self, data: Pair | None) -> Capture:
        """The gradient samples at this step.

        Args:
            data: The probe set, or the batch of this step.

        Raises:
            InvalidInputError: The batch is malformed.
        """

    def rows(self) -> list[dict[str, Any]]:
        """Rows about the last gradient samples, beside their scores."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What must be saved to go on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        return


@final
class BatchTarget(Target):
    """Gradient samples of a batch at the current weights, per example or per mini-batch."""

    needs_data = True

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        layers: str | Sequence[str],
        options: TargetOptions,
        seed: int,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.layers = layers
        self.options = options
        self.seed = seed

    def samples(self, data: Pair | None) -> Capture:
        assert data is not None
        size = self.options.target_batch_size
        drawn = capture(
            self.model,
            self.loss_fn,
            data,
            target="empirical-fisher" if size else self.options.target,
            layers=self.layers,
            seed=self.seed,
            label_draws=self.options.label_draws,
        )
        return batch_gradients(drawn, size) if size else drawn


@final
class TrajectoryTarget(Target):
    """The gradients of the run itself, in a window."""

    needs_data = False

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        layers: str | Sequence[str],
        options: TargetOptions,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.window = GradientWindow(
            model,
            size=DEFAULT_WINDOW if options.window is None else options.window,
            decay=options.decay,
            memory="1GB" if options.window_memory is None else options.window_memory,
            layers=layers,
        )
        tolerance = options.window_tolerance
        self.tolerance = DEFAULT_TOLERANCE if tolerance is None else tolerance
        self._truncated: set[str] = set()

    def update(self) -> None:
        self.window.update()

    def samples(self, data: Pair | None) -> Capture:
        samples = {}
        for name, one in self.window.samples().items():
            samples[name] = truncate(one, self.tolerance)
        self._truncated = {name for name, one in samples.items() if one.dropped_energy > 0}
        loss, accuracy = (math.nan, None) if data is None else self._evaluate(data)
        skipped = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                skipped[name] = Reason("frozen (requires_grad=False)", ReasonCode.FROZEN)
            elif name not in samples:
                why = "not selected by layers, or without a gradient so far"
                skipped[name] = Reason(why, ReasonCode.NO_GRADIENT)
        return Capture(samples, skipped, TRAJECTORY, loss, accuracy, self._note())

    def _note(self) -> str:
        kind = "sum" if self.window.decay is None else f"average with decay {self.window.decay:g}"
        return f"{kind} of the last {self.window.size} gradients"

    def _evaluate(self, data: Pair) -> tuple[float, float | None]:
        inputs, targets = data
        with isolated(self.model):
            outputs = self.model(inputs.detach().clone())
            loss = resolve_loss(self.loss_fn, outputs, targets)
            with torch.no_grad():
                return loss.value, loss.accuracy(outputs.detach(), targets)

    def rows(self) -> list[dict[str, Any]]:
        # compare writes the rows of truncated layers
        whole = self.window.dropped_energy.keys() - self._truncated
        left_out = {
            "truncated_weight": self.window.truncated_weight,
            "truncated_energy": self.window.truncated_energy,
            "dropped_energy": dict.fromkeys(sorted(whole), 0.0),
        }
        return [
            {"parameter": name, "target": TRAJECTORY, "metric": metric, "value": value}
            for metric, values in left_out.items()
            for name, value in values.items()
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"window": self.window.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "window" not in state:
            raise InvalidInputError(
                "The saved tracker holds no window of gradients; resume with the options of the "
                "run, or start a new one."
            )
        self.window.load_state_dict(state["window"])


def make_target(
    model: nn.Module,
    loss_fn: LossFunction,
    layers: str | Sequence[str],
    options: TargetOptions,
    seed: int,
) -> Target:
    """The target that ``options`` name."""
    if options.target == TRAJECTORY:
        return TrajectoryTarget(model, loss_fn, layers, options)
    return BatchTarget(model, loss_fn, layers, options, seed)
