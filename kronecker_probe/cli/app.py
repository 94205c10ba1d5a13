"""The command line: track, measure, report, workloads, analyze.

Nothing here imports torch before a command needs it; ``report`` never does.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kronecker_probe.cli.exits import DONE, FAILED, exit_codes, resumable, usage_checked
from kronecker_probe.cli.options import (
    MeasureOptions,
    PluginOptions,
    Preset,
    ProbeOptions,
    ReportOptions,
    Target,
    TrackOptions,
    taking_options,
)
from kronecker_probe.cli.plugins import load_plugins
from kronecker_probe.cli.terminal import (
    console,
    progress_shown,
    show_comparison,
    show_probes,
    show_run,
    show_table,
)
from kronecker_probe.errors import InvalidInputError, unknown_name

if TYPE_CHECKING:
    from kronecker_probe.tracking.tracker import Tracker
    from kronecker_probe.tracking.training import TrainingOptions
    from kronecker_probe.workloads import Workload

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="How good is the Kronecker approximation of each layer's curvature, along your run?",
    epilog="Exit codes: 0 done, 1 failed (what is on disk is intact), 2 bad usage, "
    "130 interrupted, 143 terminated (resume with --resume).",
)


@app.command()
@taking_options
def track(given: TrackOptions) -> None:
    """Train WORKLOAD with an optimizer and probe every layer along the way."""
    with exit_codes():
        with usage_checked():
            loaded = _loaded(given)
            from kronecker_probe.cli.several import check_several, options_of_each, track_several
            from kronecker_probe.tracking.training import Training

            options = _training_options(given, loaded)
            directory = given.out or Path("runs") / given.workload.replace(":", ".")
            each = options_of_each(options, given.optimizer, loaded.lr)
            start: Any = {"resume": given.resume, "overwrite": given.overwrite}
            keep = given.keep_checkpoints.value
            if len(each) > 1:
                check_several(loaded, given.workload, directory, each, **start)
            else:
                training = Training(
                    loaded, given.workload, directory, each[0], **start, keep_checkpoints=keep
                )
        if len(each) > 1:
            comparison, diverged = track_several(
                given.workload, directory, each, **start, keep_checkpoints=keep
            )
            show_comparison(comparison)
            raise typer.Exit(FAILED if diverged else DONE)
        show_probes(training.probed)
        with resumable(training), progress_shown(options.steps) as show:
            training.run(show)
        show_run(directory)


def _loaded(given: ProbeOptions) -> Workload:
    """The workload, after the plugins that may register it."""
    load_plugins(given.plugin)
    import torch

    from kronecker_probe.workloads import load_workload

    loaded = load_workload(given.workload, given.seed)
    threads = given.threads or loaded.threads
    if threads is not None:
        torch.set_num_threads(threads)
    return loaded


def _measured(given: ProbeOptions, loaded: Workload) -> dict[str, Any]:
    """What the tracker and the options of a training call alike."""
    return {
        "target": loaded.target if given.target is None else given.target.value,
        "layers": loaded.layers if given.layers is None else tuple(given.layers),
        "seed": given.seed,
        "label_draws": given.label_draws,
        "target_batch_size": given.target_batch_size,
        "approximations": _names(given.approximations),
        "metrics": _names(given.metrics),
        "estimates": _names(given.estimates),
    }


def _names(given: list[str] | None) -> tuple[str, ...] | None:
    return tuple(given) if given else None


def _training_options(given: TrackOptions, loaded: Workload) -> TrainingOptions:
    from kronecker_probe.tracking.training import TrainingOptions

    every = given.precondition_frequency
    settings = () if every is None else (f"basis.frequency={every}",)
    return TrainingOptions(
        **_measured(given, loaded),
        steps=loaded.steps if given.steps is None else given.steps,
        batch_size=loaded.batch_size if given.batch_size is None else given.batch_size,
        lr=given.lr,
        settings=(*settings, *(given.settings or ())),
        probes=given.probes,
        spacing=given.spacing.value,
        probe_offset=given.probe_offset,
        probe_size=given.probe_size,
        device=given.device,
        window=given.window,
        decay=given.decay,
        window_memory=given.window_memory,
        window_tolerance=given.window_tolerance,
    )


@app.command()
@taking_options
def measure(given: MeasureOptions) -> None:
    """Measure WORKLOAD once, at initialization or at a checkpoint."""
    with exit_codes():
        with usage_checked():
            tracker = _measuring(given)
            from kronecker_probe.tracking.training import ending_noted
        with ending_noted(tracker):
            tracker.finish()
        if given.out is not None:
            show_run(given.out)
        else:
            show_table(tracker.table, asked=given.metrics is not None)


def _measuring(given: MeasureOptions) -> Tracker:
    if given.target is Target.TRAJECTORY:
        raise InvalidInputError(
            "--target trajectory is made of a run's own gradients; use 'track'."
        )
    if given.overwrite and given.out is None:
        raise InvalidInputError("--overwrite needs --out.")
    loaded = _loaded(given)
    from kronecker_probe.tracking.tracker import Tracker
    from kronecker_probe.tracking.training import torch_device
    from kronecker_probe.tracking.training_state import load_model, load_training_state

    measured = _measured(given, loaded)
    if given.target is Target.BATCH_GRADIENT and given.target_batch_size is None:
        measured["target_batch_size"] = loaded.batch_size
    where = torch_device(given.device)
    step, file = 0, given.checkpoint
    if file is not None:
        state = load_training_state(file)
        load_model(loaded.model, state, file)
        step = state.tracker.steps_taken
    inputs, targets = loaded.probe(given.probe_size, given.seed)
    return Tracker(
        loaded.model.to(where),
        loaded.loss_fn,
        out=given.out,
        probe=(inputs.to(where), targets.to(where)),
        **measured,
        config={
            "workload": given.workload,
            "checkpoint": None if file is None else str(file),
            "probe_size": given.probe_size,
        },
        overwrite=given.overwrite,
        start=step,
    )


@app.command()
@taking_options
def report(given: ReportOptions) -> None:
    """Redraw every figure and report.html of RUN from its stored table (needs no torch)."""
    with exit_codes():
        with usage_checked():
            load_plugins(given.plugin)
            from kronecker_probe.report.comparison import Comparison
            from kronecker_probe.report.run_page import write_report
            from kronecker_probe.tracking.run_directory.store import RunStore

            if Comparison.holds(given.run):
                comparison = Comparison.open(given.run)
                for store in comparison.stores().values():
                    if store.steps():
                        write_report(store.path)
                show_comparison(comparison)
                return
            RunStore.open(given.run)
        show_run(given.run)


@app.command()
@taking_options
def workloads(given: PluginOptions) -> None:
    """List the workloads, built-in and of plugins."""
    with exit_codes():
        with usage_checked():
            load_plugins(given.plugin)
        from kronecker_probe.workloads import WORKLOADS, load_workload

        table = Table("name", "what", "steps", "batch", "lr")
        for name in WORKLOADS:
            one = load_workload(name)
            numbers = (str(one.steps), str(one.batch_size), f"{one.lr:g}")
            table.add_row(name, one.description, *numbers)
        console.print(table)
        console.print("Your own: package.module:factory, a function (seed) -> kp.Workload.")


@app.command()
def analyze(
    name: Annotated[str, typer.Argument(metavar="NAME", help="For example shampoo-square.")],
    preset: Annotated[
        Preset, typer.Option(help="quick: under a minute; default: what figures/ shows.")
    ] = Preset.DEFAULT,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the table and the figure.")
    ] = Path("figures"),
) -> None:
    """Run an analysis: one question, one table, one figure."""
    with exit_codes():
        with usage_checked():
            package, folder = _analyses()
            entries = [*folder.glob("*.py"), *(p.parent for p in folder.glob("*/__init__.py"))]
            known = {p.stem.replace("_", "-"): p.stem for p in sorted(entries)}
            if name not in known:
                raise unknown_name("analysis", name, known)
        script = importlib.import_module(f"{package}.{known[name]}").SCRIPT
        script.main(["--preset", preset.value, "--out", str(out)])


def _analyses() -> tuple[str, Path]:
    """The package and the folder of the analyses of an installed wheel, or of the source tree."""
    own = Path(__file__).parents[1]
    if (own / "_analyses").is_dir():
        return "kronecker_probe._analyses", own / "_analyses"
    if (own.parent / "analyses").is_dir():
        if str(own.parent) not in sys.path:  # the command's own folder is there instead
            sys.path.insert(0, str(own.parent))
        return "analyses", own.parent / "analyses"
    raise InvalidInputError("This installation holds no analyses; install from the source tree.")


def main() -> None:
    """Entry point of the ``kronecker-probe`` command."""
    app()
