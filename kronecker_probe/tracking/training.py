"""Training a workload with an optimizer by name while tracking it; resumable at every probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, NonFiniteError, RunDirectoryError
from kronecker_probe.gradients.api import capture
from kronecker_probe.gradients.batch_means import BATCH_GRADIENT
from kronecker_probe.gradients.targets import CAPTURE_TARGETS
from kronecker_probe.gradients.tracing.isolation import isolated
from kronecker_probe.optim.build import build_optimizer, learning_rates
from kronecker_probe.tracking.checkpoints import Checkpoints
from kronecker_probe.tracking.run_directory.files import shown
from kronecker_probe.tracking.schedule import spread
from kronecker_probe.tracking.target import TargetOptions
from kronecker_probe.tracking.tracker import Tracker
from kronecker_probe.workloads import Workload

# examples on which a workload is tried before its training begins
FEW = 4
# options that the tracker puts into run.json
_RECORDED = (*vars(TargetOptions()), "approximations", "metrics", "estimates")


@final
@dataclass(frozen=True)
class TrainingOptions:
    """How a workload is trained and probed.

    All options that are not listed are those of :class:`Tracker`; None stands for its default.

    Attributes:
        steps: Optimizer steps.
        batch_size: Examples per step.
        lr: Learning rate; None for the optimizer's own default.
        optimizer: Its name, as for ``optim.build.build_optimizer``.
        settings: Its settings, for example "basis.tolerance=0.1".
        probes: Number of probed steps, both ends included.
        spacing: "even", or "early" for more of them at the start.
        probe_offset: Steps by which all probes but the first and last are moved.
        probe_size: Examples in the fixed probe set.
        seed: Of the model, the batches, the probe set and the sampled labels.
        device: Torch device.
        target_batch_size: Examples per batch, for "batch-gradient"; None for ``batch_size``.
    """

    steps: int
    batch_size: int
    lr: float | None
    optimizer: str = "shampoo"
    settings: tuple[str, ...] = ()
    probes: int = 21
    spacing: str = "even"
    probe_offset: int = 0
    probe_size: int = 200
    target: str = "ggn"
    layers: tuple[str, ...] = ("*weight",)
    seed: int = 0
    device: str = "cpu"
    label_draws: int = 1
    target_batch_size: int | None = None
    window: int | None = None
    decay: float | None = None
    window_memory: str | None = None
    window_tolerance: float | None = None
    approximations: tuple[str, ...] | None = None
    metrics: tuple[str, ...] | None = None
    estimates: tuple[str, ...] | None = None


@final
@dataclass(frozen=True)
class Progress:
    """Where the training stands.

    Attributes:
        step: Optimizer steps taken.
        loss: Loss of the last batch.
        accuracy: Last accuracy on the test set; NaN where there is none.
        tested_at: The step at which that was measured; None where there is none.
    """

    step: int
    loss: float
    accuracy: float
    tested_at: int | None = None


@final
class Training:
    """One run: model, optimizer, tracker and checkpoints in a run directory.

    Args:
        workload: What is trained.
        name: Its name, for run.json.
        out: The run directory.
        options: How it is trained and probed.
        resume: Go on with the run in ``out``, from its last checkpoint.
        overwrite: Delete the run in ``out`` first.
        keep_checkpoints: "last", or "all" for one at every probed step.

    Raises:
        RunDirectoryError: As for :class:`Tracker`.
        InvalidInputError: An option is out of range.
    """

    def __init__(
        self,
        workload: Workload,
        name: str,
        out: Path,
        options: TrainingOptions,
        *,
        resume: bool = False,
        overwrite: bool = False,
        keep_checkpoints: str = "last",
    ) -> None:
        self.workload = workload
        self.options = options
        if str(out) != shown(out):
            raise InvalidInputError(
                f"The run directory {shown(out)} is no UTF-8 path, which checkpoints "
                "(safetensors) need; choose another path."
            )
        self.probed = spread(options.steps, options.probes, options.spacing, options.probe_offset)
        device = torch_device(options.device)
        self.model = workload.model.to(device)
        named = self.model.named_parameters()
        self.optimizer = build_optimizer(
            options.optimizer, named, options.lr, options.settings, self.model
        )
        self._try_workload(device)
        self.tracker = Tracker(
            self.model,
            workload.loss_fn,
            optimizer=self.optimizer,
            out=out,
            every=self.probed,
            probe=_to(workload.probe(options.probe_size, options.seed), device),
            config={"workload": name, **_config(options)},
            resume=resume,
            overwrite=overwrite,
            **_tracker_options(options),
        )
        assert self.tracker.store is not None
        self.store = self.tracker.store
        self.device = device
        self.accuracy = math.nan
        self.tested_at: int | None = None
        self.checkpoints = Checkpoints(
            self.store, self.model, self.optimizer, self.tracker, keep_all=keep_checkpoints == "all"
        )
        if resume:
            self.checkpoints.restore(self.probed, options.steps)
        self.store.note_rates(learning_rates(self.optimizer))

    def _try_workload(self, device: torch.device) -> None:
        """Try model, loss, layers and test set on a few examples, before anything is written.

        Raises:
            KroneckerProbeError: That of ``kp.capture``, or the model does not take test inputs.
        """
        inputs, targets = _to(self.workload.probe(FEW, self.options.seed), device)
        capture(
            self.model,
            self.workload.loss_fn,
            (inputs, targets),
            target=self.options.target
            if self.options.target in CAPTURE_TARGETS
            else "empirical-fisher",
            layers=self.options.layers,
        )
        if self.workload.test is None:
            return
        with isolated(self.model), torch.no_grad():
            tested = self.workload.test[0][:FEW].to(device)
            try:
                self.model(tested)
            except RuntimeError as error:
                raise InvalidInputError(
                    f"The model takes the training inputs {list(inputs.shape)} and not the test "
                    f"inputs {list(tested.shape)}: {error}"
                ) from error

    def run(self, report: Callable[[Progress], None] = lambda progress: None) -> Tracker:
        """Train to the end.

        Args:
            report: Called after every step.

        Raises:
            NonFiniteError: The loss became NaN or infinite; what was measured is stored.
            KeyboardInterrupt: Interrupted; the run can be resumed.
        """
        with ending_noted(self.tracker):
            for step in range(self.tracker.steps_taken, self.options.steps):
                loss = self._step(step)
                report(Progress(step + 1, loss, self.accuracy, self.tested_at))
            with self.checkpoints.around():
                self._probe_accuracy()
                self.tracker.finish()
        return self.tracker

    def _step(self, step: int) -> float:
        """One optimizer step; at a probed step the state before it is stored and measured."""
        with self.checkpoints.around() if step in self.probed else nullcontext():
            batch = _to(
                self.workload.batch(step, self.options.batch_size, self.options.seed), self.device
            )
            self.optimizer.zero_grad()
            loss = self.workload.loss_fn(self.model(batch[0]), batch[1])
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"Training diverged: the loss is {value} at step {step}. Lower the learning "
                    f"rate (lr={self.optimizer.param_groups[0]['lr']:g})."
                )
            loss.backward()  # type: ignore[no-untyped-call]
            self.tracker.log(train_loss=value)
            if step in self.probed:
                self._probe_accuracy()
            self.tracker.step(batch)
        self.optimizer.step()
        return value

    def _probe_accuracy(self) -> None:
        test = self.workload.test
        if test is None or test[1].dtype.is_floating_point:
            return
        inputs, targets = _to(test, self.device)
        with isolated(self.model), torch.no_grad():
            outputs = self.model(inputs)
        class_dim = 1 if outputs.shape[0:1] + outputs.shape[2:] == targets.shape else -1
        self.accuracy = float((outputs.argmax(dim=class_dim) == targets).double().mean())
        self.tested_at = self.tracker.steps_taken
        self.tracker.log(test_accuracy=self.accuracy)


@contextmanager
def ending_noted(tracker: Tracker) -> Iterator[None]:
    """Record in run.json, if there is one, that the block was interrupted or why it failed."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        status = "interrupted" if interrupted else "failed"
        reason = f"interrupted at step {tracker.steps_taken}" if interrupted else str(error)
        if tracker.store is not None:
            # the disk that made a run fail makes its record fail too; raise the first error
            with suppress(RunDirectoryError):
                tracker.store.set_status(status, reason)
        raise


def torch_device(name: str) -> torch.device:
    """A device by name, tried once.

    Raises:
        InvalidInputError: There is no such device here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInputError(f"device={name!r} cannot be used: {reason}") from error
    return device


def _to(pair: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    return pair[0].to(device), pair[1].to(device)


def _tracker_options(options: TrainingOptions) -> dict[str, Any]:
    values = {name: getattr(options, name) for name in (*_RECORDED, "layers", "seed")}
    if options.target == BATCH_GRADIENT and options.target_batch_size is None:
        values["target_batch_size"] = options.batch_size
    return values


def _config(options: TrainingOptions) -> dict[str, Any]:
    """The options for run.json, but for those that the tracker records itself."""
    kept = {key: value for key, value in asdict(options).items() if key not in _RECORDED}
    if not options.probe_offset:  # as in runs stored before it was an option
        del kept["probe_offset"]
    return kept | {"layers": list(options.layers)}
