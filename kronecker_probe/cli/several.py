"""Tracking one workload with several optimizers, one run after the other."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kronecker_probe.cli.exits import resumable
from kronecker_probe.cli.terminal import errors, progress_shown, show_probes
from kronecker_probe.errors import (
    InvalidInputError,
    KroneckerProbeError,
    NonFiniteError,
    RunDirectoryError,
    unknown_name,
)
from kronecker_probe.optim.build import (
    LIKE_ADAM,
    build_optimizer,
    optimizer_names,
    settings_for,
)
from kronecker_probe.report.comparison import Comparison, Timing
from kronecker_probe.report.run_page import write_report
from kronecker_probe.table.escaping import for_terminal
from kronecker_probe.tracking.run_directory.files import remove_temporaries
from kronecker_probe.tracking.run_directory.lock import Lock
from kronecker_probe.tracking.run_directory.record import FILE, as_json
from kronecker_probe.tracking.training import Progress, Training, TrainingOptions
from kronecker_probe.workloads import Workload, load_workload

# Options of a run in which runs that are compared may differ.
_OWN = ("optimizer", "settings", "lr", "device", "approximations", "metrics", "estimates")


def options_of_each(
    options: TrainingOptions, optimizers: Sequence[str], like_adam: float
) -> list[TrainingOptions]:
    """The options of each optimizer's run.

    Args:
        options: Of the call: ``lr`` None where it is not given, ``settings`` for all
            ("basis.frequency=5") and for one alone ("soap:basis.frequency=5", "adamw:lr=3e-3").
        optimizers: Their names.
        like_adam: Where no learning rate is given, that of optimizers with steps as long as Adam's.

    Raises:
        InvalidInputError: A setting for an optimizer that is not among them, or a learning rate
            that is none.
    """
    found = []
    for name in optimizers:
        lr, settings = settings_for(name, options.settings, optimizers)
        if lr is None:
            lr = options.lr
        if lr is None and name in LIKE_ADAM:
            lr = like_adam
        found.append(replace(options, optimizer=name, lr=lr, settings=settings))
    return found


def check_several(
    workload: Workload,
    name: str,
    directory: Path,
    options: Sequence[TrainingOptions],
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Refuse what can be refused before the first run starts.

    Args:
        workload: What is trained.
        name: Its name.
        directory: Of the comparison.
        options: Of each run.
        resume: Go on with the runs that are there.
        overwrite: Delete them first.

    Raises:
        InvalidInputError: An optimizer given twice, or one that does not take the settings.
        RunDirectoryError: A run is there already, or ``directory`` is itself a run, or holds other
            files, or runs of something else.
    """
    names = [one.optimizer for one in options]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidInputError(f"--optimizer {twice[0]} is given twice; give each once.")
    if resume and overwrite:
        raise InvalidInputError("--resume with --overwrite; choose one.")
    for one in options:
        _try_building(workload, one)
    if directory.exists() and not directory.is_dir():
        raise RunDirectoryError(f"{directory} is a file; choose another path for the runs.")
    if (directory / FILE).exists():
        raise RunDirectoryError(
            f"{directory} holds a single run; choose another path for those of {len(names)} "
            "optimizers."
        )
    if directory.is_dir() and not Comparison.holds(directory) and any(directory.iterdir()):
        raise RunDirectoryError(
            f"{directory} is not empty and holds no comparison; choose another path."
        )
    held = [name for name in names if (directory / name / FILE).exists()]
    if held and not (resume or overwrite):
        raise RunDirectoryError(
            f"{directory} holds a run of {', '.join(held)} already; go on with --resume, delete it "
            "with --overwrite, or choose another path."
        )
    if Comparison.holds(directory):
        replaced = names if overwrite else []
        _check_alike(Comparison.open(directory), {"workload": name, **asdict(options[0])}, replaced)


def _try_building(workload: Workload, one: TrainingOptions) -> None:
    """Build the optimizer of a run, on a copy of the model; an error names it."""
    if one.optimizer not in optimizer_names():
        raise unknown_name("optimizer", one.optimizer, optimizer_names())
    model = copy.deepcopy(workload.model)  # which an optimizer may hook
    try:
        build_optimizer(one.optimizer, model.named_parameters(), one.lr, one.settings, model)
    except KroneckerProbeError as error:
        remedy = " For one optimizer alone write --set NAME:option=value." if one.settings else ""
        raise type(error)(f"{one.optimizer}: {error}{remedy}") from error


def _check_alike(comparison: Comparison, config: dict[str, Any], replaced: Sequence[str]) -> None:
    """Refuse to put runs of other data, targets or lengths into one table."""
    wanted = as_json({key: value for key, value in config.items() if key not in _OWN})
    for name, store in comparison.stores().items():
        held = store.config
        for key in sorted(wanted.keys() & held.keys()) if name not in replaced else ():
            if held[key] != wanted[key]:
                raise RunDirectoryError(
                    f"{comparison.path} holds a run of {name} with {key} {held[key]!r}, and that "
                    f"of now is {wanted[key]!r}: they would not compare. Choose another path, or "
                    "the same options."
                )


def track_several(
    workload: str,
    directory: Path,
    options: Sequence[TrainingOptions],
    *,
    resume: bool,
    overwrite: bool,
    keep_checkpoints: str,
) -> tuple[Comparison, list[str]]:
    """Run them one after the other, each in a directory of its name, with a report of its own.

    A run that diverges does not keep the others from running.

    Args:
        workload: Its name; it is made anew for each run.
        directory: Of the comparison.
        options: Of each run.
        resume: Go on with the runs that are there.
        overwrite: Delete them first.
        keep_checkpoints: As for :class:`Training`.

    Returns:
        The comparison, and the optimizers that diverged.
    """
    if not Comparison.holds(directory):
        Comparison(directory, {}).save()
    held = hold(directory)  # to the end of this function
    # of runs from an earlier call, the times and the place in the comparison
    kept = Comparison.open(directory).timings
    diverged = []
    for one in options:
        fresh = overwrite or not (directory / one.optimizer / FILE).exists()
        before = Timing() if fresh else kept.get(one.optimizer, Timing())
        kept[one.optimizer] = before
        Comparison(directory, kept).save()
        training = Training(
            load_workload(workload, one.seed),
            workload,
            directory / one.optimizer,
            one,
            resume=resume,
            overwrite=overwrite and (directory / one.optimizer).exists(),
            keep_checkpoints=keep_checkpoints,
        )
        errors.print(f"[bold]{for_terminal(one.optimizer)}[/]", highlight=False)
        show_probes(training.probed)

        def save(timing: Timing, name: str = one.optimizer, past: Timing = before) -> None:
            kept[name] = past + timing
            Comparison(directory, kept).save()

        clock = _Clock(training.probed, save)
        try:
            with resumable(training), progress_shown(one.steps) as show:
                training.run(clock.then(show))
        except NonFiniteError as error:
            diverged.append(one.optimizer)
            errors.print(
                f"[red]{for_terminal(one.optimizer)}:[/] {for_terminal(error)}", soft_wrap=True
            )
        finally:
            save(clock.timing())
        if training.store.steps():
            write_report(training.store.path)
    del held
    return Comparison(directory, kept), diverged


def hold(directory: Path) -> Lock:
    """The lock of a comparison's directory, in which killed writers' files are then removed.

    Raises:
        RunDirectoryError: Another process writes to it.
    """
    lock = Lock(directory)
    remove_temporaries(directory)
    return lock


class _Clock:
    """Times a run, and its steps without a probe; tells at each probe, should it be the last."""

    def __init__(self, probed: Sequence[int], tell: Callable[[Timing], None]) -> None:
        self.probed = frozenset(probed)
        self.tell = tell
        self.started = self.last = time.perf_counter()
        self.steps = 0
        self.step_seconds = 0.0

    def then(self, show: Callable[[Progress], None]) -> Callable[[Progress], None]:
        """What to call after every step: this clock, then ``show``."""

        def both(state: Progress) -> None:
            self.tick(state.step)
            show(state)

        return both

    def tick(self, taken: int) -> None:
        """After a step; the one before ``taken`` was probed or not."""
        now = time.perf_counter()
        if taken - 1 in self.probed:
            self.tell(self.timing())
        else:
            self.steps += 1
            self.step_seconds += now - self.last
        self.last = now

    def timing(self) -> Timing:
        """So far."""
        return Timing(time.perf_counter() - self.started, self.steps, self.step_seconds)
