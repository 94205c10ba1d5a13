"""Measuring a model along its training, without changing the training."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import pandas as pd
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.gradients.coverage import Capture
from kronecker_probe.gradients.losses import LossFunction
from kronecker_probe.gradients.selection import select
from kronecker_probe.gradients.targets import CAPTURE_TARGETS
from kronecker_probe.operators.base import Operator
from kronecker_probe.quality.compare import (
    Row,
    Scores,
    approximation_names,
    chosen_metrics,
    compare,
    to_table,
)
from kronecker_probe.quality.estimates.estimate import check_kinds
from kronecker_probe.table.schema import conform, empty_table
from kronecker_probe.tracking.optimizer_state.in_use import read_state
from kronecker_probe.tracking.run_directory.record import FILE
from kronecker_probe.tracking.run_directory.store import RunStore
from kronecker_probe.tracking.schedule import Schedule, make_schedule
from kronecker_probe.tracking.target import TRAJECTORY, TargetOptions, make_target


@final
class Tracker:
    """Measures approximation quality at scheduled steps of a training loop.

    Call :meth:`step` once per iteration, after ``backward()`` and before ``optimizer.step()``.
    At scheduled steps it measures the model as it is; at others it does nothing, except that the
    target "trajectory" copies the gradients of every step. Model, gradients, random generators
    (those that modules hold included) and the training trajectory stay bitwise the same.

    Args:
        model: The model being trained.
        loss_fn: As for ``kp.capture``.
        optimizer: If given, its preconditioner in use is scored too, as the approximation "in-use".
            Several may be given, such as Muon for hidden matrices and AdamW for the rest.
        out: Run directory; None keeps the numbers in memory only.
        every: Interval in steps, a collection of steps, or a predicate on the step. Probes every
            20 steps always meet an optimizer that refreshes every 10 steps right after a refresh;
            an interval without a common divisor shows the loss from staleness too.
        probe: Fixed (inputs, targets) to measure, so that the curve shows training and not batch
            noise; None measures the batch given to :meth:`step` or :meth:`finish`.
        target: Which H: "ggn", "fisher", "empirical-fisher"; "batch-gradient" (the exact second
            moment of mini-batch mean gradients at the true labels, ``kp.batch_gradients``); or
            "trajectory" (the run's own gradients, ``kp.GradientWindow``, whose second moment the
            optimizer's factors estimate; the probe set then only gives the probe's loss).
        layers: Glob, or several, of parameter names; by default all weights, no biases.
        approximations: A name or spec, or several, as for ``kp.compare``; None for the six.
        metrics: A metric, or several, as for ``kp.compare``; None for the four of the cosine.
        estimates: "plugin", "held-out", "population", or several; None for plug-in and population,
            and for plug-in alone where gradient samples are not independent ("batch-gradient",
            "trajectory").
        seed: Of the label samples.
        label_draws: Label samples per example, for "fisher".
        target_batch_size: Examples per batch, for "batch-gradient".
        window: Gradients to keep, for "trajectory"; None for 200.
        decay: Of the gradients' average, for "trajectory": the optimizer's beta2; None for a sum.
        window_memory: Largest size of the window, for "trajectory"; None for "1GB".
        window_tolerance: Share of the gradients' energy that truncation may leave out, for
            "trajectory"; None for 1e-3, which moves cosines by less than that; 0 for exact.
        singular_values: Leading singular values of R(H) to store at each probe; None for 8, and
            for "trajectory" for 1, because each further one takes many passes over the window.
        config: Options of the run for run.json; they must be the same on resuming.
        resume: Go on with the run in ``out``: steps that it holds are not measured again. A run
            that is not there yet is started.
        overwrite: Delete the run in ``out`` first.
        start: Optimizer steps taken before the first call of :meth:`step`.

    Raises:
        RunDirectoryError: ``out`` holds another run, cannot be written, or was made with other
            options.
        InvalidInputError: An option is out of range or without effect; the message names it.
        MemoryBudgetError: The window would not fit; the message proposes a size.
        UnknownNameError: Unknown target or approximation, or a glob that matches no parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        out: str | Path | None = None,
        every: int | Collection[int] | Schedule = 20,
        probe: tuple[Tensor, Tensor] | None = None,
        target: str = "ggn",
        layers: str | Sequence[str] = "*weight",
        approximations: str | Sequence[str] | None = None,
        metrics: str | Sequence[str] | None = None,
        estimates: str | Sequence[str] | None = None,
        seed: int = 0,
        label_draws: int = 1,
        target_batch_size: int | None = None,
        window: int | None = None,
        decay: float | None = None,
        window_memory: str | int | None = None,
        window_tolerance: float | None = None,
        singular_values: int | None = None,
        config: Mapping[str, Any] | None = None,
        resume: bool = False,
        overwrite: bool = False,
        start: int = 0,
    ) -> None:
        options = TargetOptions(
            target, label_draws, target_batch_size, window, decay, window_memory, window_tolerance
        )
        options.check()
        names = approximation_names(approximations)
        chosen_metrics(metrics)
        kinds = _default_kinds(target) if estimates is None else check_kinds(estimates)
        if not any(map(is_lazy, model.parameters())):
            select(model, layers)  # before the run directory is touched
        if singular_values is None:
            singular_values = 1 if target == TRAJECTORY else 8
        _check(out, resume, overwrite, singular_values=singular_values, start=start)
        self.model = model
        self.loss_fn = loss_fn
        self.optimizers = _optimizers(optimizer)
        self.probe = probe
        self.target = make_target(model, loss_fn, layers, options, seed)
        self.layers = layers
        self.approximations = names
        self.metrics = metrics
        self.kinds = kinds
        self.seed = seed
        self.singular_values = singular_values
        self.steps_taken = start
        self._schedule = make_schedule(every)
        self._pending: list[Row] = []
        self._parts: list[pd.DataFrame] = []
        self._measured: set[int] = set()
        self.store = None
        if out is not None:
            self.store = self._open(Path(out), options, config or {}, resume, overwrite)

    def _open(
        self,
        out: Path,
        target: TargetOptions,
        config: Mapping[str, Any],
        resume: bool,
        overwrite: bool,
    ) -> RunStore:
        # like the target's, only what differs from the default: older runs can be resumed
        asked: dict[str, Any] = {} if self.metrics is None else {"metrics": _plain(self.metrics)}
        if self.kinds != _default_kinds(target.target):
            asked["estimates"] = _plain(self.kinds)
        options: dict[str, Any] = {
            "layers": _plain(self.layers),
            "approximations": list(self.approximations),
            "seed": self.seed,
            "singular_values": self.singular_values,
            **target.record(),
            **asked,
            **config,
        }
        if resume and (out / FILE).exists():
            store = RunStore.resume(out, options)
            self._measured.update(store.steps())
            return store
        device = next((str(p.device) for p in self.model.parameters()), "cpu")
        return RunStore.create(out, options, seed=self.seed, device=device, overwrite=overwrite)

    def step(self, batch: tuple[Tensor, Tensor] | None = None) -> Scores | None:
        """Measure if this step is on schedule, then count it.

        For "trajectory" the gradients of every step are recorded first.

        Args:
            batch: The (inputs, targets) of this iteration; measured where no ``probe`` was given.

        Returns:
            The scores if this step was measured, else None.

        Raises:
            NonFiniteError: NaN or infinity on the way; what was measured before is stored.
            InvalidInputError: Neither a ``probe`` nor a ``batch``, or a malformed one.
        """
        self.target.update()
        scores = self.measure(batch) if self._schedule(self.steps_taken) else None
        self.steps_taken += 1
        return scores

    def measure(self, batch: tuple[Tensor, Tensor] | None = None) -> Scores | None:
        """Measure now, on schedule or not; None if this step is stored already."""
        if self.steps_taken in self._measured:
            self._pending.clear()  # the stored part holds these rows
            return None
        data = self.probe if self.probe is not None else batch
        if data is None and self.target.needs_data:
            raise InvalidInputError(
                "Nothing to measure: give the Tracker a probe=(inputs, targets), or a batch to "
                f"this call (step {self.steps_taken})."
            )
        samples = self.target.samples(data)
        in_use, beside = self._read_optimizers(samples)
        scores = compare(
            samples,
            self.approximations,
            metrics=self.metrics,
            estimates=self.kinds,
            singular_values=self.singular_values,
            extra=in_use,
        )
        self._store(scores, samples, beside)
        return scores

    def log(self, **values: float) -> None:
        """Record numbers of the current step, for example ``train_loss``; stored at the next probe.

        Raises:
            InvalidInputError: A value is not a number.
        """
        for metric, value in values.items():
            try:
                number = float(value)
            except (TypeError, ValueError) as error:
                raise InvalidInputError(
                    f"log({metric}={value!r}): the value must be a number."
                ) from error
            self._pending.append({"step": self.steps_taken, "metric": metric, "value": number})

    def __repr__(self) -> str:
        kept = f"stored in {self.store.path}" if self.store is not None else "in memory"
        steps = ", ".join(map(str, sorted(self._measured))) or "none yet"
        layers = self.layers if isinstance(self.layers, str) else ", ".join(self.layers)
        return f"Tracker(layers {layers}; steps probed: {steps}; {kept})"

    def finish(self, batch: tuple[Tensor, Tensor] | None = None) -> None:
        """Measure the last state, unless it was just measured, and mark the run as done."""
        if self.steps_taken not in self._measured:
            self.measure(batch)
        if self.store is not None:
            self.store.set_status("done")

    def state_dict(self) -> dict[str, Any]:
        """Where the tracker stands, for a checkpoint taken before this step's :meth:`log`.

        Returns:
            ``steps_taken``, and ``logged``, the numbers that no part holds yet; for "trajectory"
            also the tensors of the window.
        """
        logged = [dict(row) for row in self._pending]
        return {"steps_taken": self.steps_taken, "logged": logged, **self.target.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, so that the resumed run logs every step once.

        Raises:
            InvalidInputError: It is of a tracker with another window.
        """
        self.target.load_state_dict(state)
        self.steps_taken = int(state["steps_taken"])
        self._pending = [dict(row) for row in state["logged"]]

    @property
    def table(self) -> pd.DataFrame:
        """Everything measured so far, with a column ``step``; from disk where there is a run."""
        if self.store is not None:
            return self.store.read()
        if not self._parts:
            return empty_table()
        table = pd.concat(self._parts, ignore_index=True)
        return table.sort_values("step", kind="stable", ignore_index=True)

    def plot(self, **options: Any) -> Any:
        """The trajectory figure; returns its Axes."""
        from kronecker_probe.plots.run import plot_trajectory

        return plot_trajectory(self.table, **options)

    def _read_optimizers(
        self, samples: Capture
    ) -> tuple[dict[str, dict[str, Operator]], list[Row]]:
        if not self.optimizers:
            return {}, []
        return read_state(self.optimizers, dict(self.model.named_parameters()), samples)

    def _store(self, scores: Scores, samples: Capture, beside: list[Row]) -> None:
        step = self.steps_taken
        run: list[Row] = [{"step": step} | row for row in self.target.rows()]
        if not math.isnan(samples.loss):
            run.append({"step": step, "metric": "probe_loss", "value": samples.loss})
        if samples.accuracy is not None:
            run.append({"step": step, "metric": "probe_accuracy", "value": samples.accuracy})
        rows = [*self._pending, *run, *({"step": step} | row for row in beside)]
        scored = scores.table.copy()
        scored.insert(0, "step", step)
        part = pd.concat([scored, to_table(rows, ["step"])], ignore_index=True)
        if self.store is None:
            self._parts.append(conform(part))
        else:
            self.store.write_part(step, part)
        self._measured.add(step)
        self._pending.clear()


def _check(out: object, resume: bool, overwrite: bool, **counts: int) -> None:
    if out is None and (resume or overwrite):
        raise InvalidInputError("resume and overwrite need a run directory: give out=.")
    if resume and overwrite:
        raise InvalidInputError("resume=True with overwrite=True; choose one.")
    for option, value in counts.items():
        if value < 0:
            raise InvalidInputError(f"{option}={value}; give 0 or more.")


def _default_kinds(target: str) -> tuple[str, ...]:
    """Estimates need independent gradient samples, which batches and trajectories do not give."""
    return ("plugin", "population") if target in CAPTURE_TARGETS else ("plugin",)


def _plain(names: str | Sequence[str]) -> str | list[str]:
    return names if isinstance(names, str) else list(names)


def _optimizers(given: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """As a tuple.

    Raises:
        InvalidInputError: Something that is no optimizer of torch's kind.
    """
    if given is None:
        return ()
    found = tuple(given) if isinstance(given, Sequence) else (given,)
    for one in found:
        if not (hasattr(one, "param_groups") or hasattr(one, "operator")):
            raise InvalidInputError(
                f"Tracker got an optimizer= of type {type(one).__name__}, which has no "
                "param_groups; give a torch.optim.Optimizer, or a list of them."
            )
    return found
