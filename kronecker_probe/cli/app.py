"""The command line: track, measure, report, workloads, analyze.

Nothing here imports torch before a command needs it; ``report`` never does.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kronecker_probe.cli.exits import DONE, FAILED, exit_codes, usage_checked
from kronecker_probe.cli.interruption import resumable
from kronecker_probe.cli.options import (
    DEFAULT_OPTIMIZERS,
    ApproximationsOption,
    DecayOption,
    DeviceOption,
    EstimatesOption,
    Keep,
    LabelDrawsOption,
    LayersOption,
    MetricsOption,
    OptimizerOption,
    PluginOption,
    Preset,
    ProbeSizeOption,
    SeedOption,
    SettingsOption,
    Spacing,
    Target,
    TargetBatchSizeOption,
    TargetOption,
    ThreadsOption,
    WindowMemoryOption,
    WindowOption,
    WindowToleranceOption,
    WorkloadName,
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

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="How good is the Kronecker approximation of each layer's curvature, along your run?",
    epilog="Exit codes: 0 done, 1 failed (what is on disk is intact), 2 bad usage, "
    "130 interrupted, 143 terminated (resume with --resume).",
)


@app.command()
def track(
    workload: WorkloadName,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Run directory. Default: runs/WORKLOAD.", show_default=False
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Optimizer steps. Default: the workload's.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Examples per step. Default: the workload's.",
            show_default=False,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0.0,
            help="Learning rate. Default: the workload's, for steps as long as Adam's; else the "
            "optimizer's. One of several optimizers has its own by --set NAME:lr=X.",
            show_default=False,
        ),
    ] = None,
    optimizer: OptimizerOption = DEFAULT_OPTIMIZERS,
    settings: SettingsOption = None,
    precondition_frequency: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Steps between refreshes: --set basis.frequency=N.",
            show_default=False,
        ),
    ] = None,
    probes: Annotated[
        int,
        typer.Option(metavar="N", min=2, help="Number of probed steps, first and last included."),
    ] = 21,
    spacing: Annotated[
        Spacing, typer.Option(help="Probed steps: more of them early in the run, or even.")
    ] = Spacing.EARLY,
    probe_offset: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Steps by which all probes but the first and last are moved, to fall between "
            "refreshes.",
        ),
    ] = 0,
    probe_size: ProbeSizeOption = 200,
    target: TargetOption = None,
    label_draws: LabelDrawsOption = 1,
    target_batch_size: TargetBatchSizeOption = None,
    window: WindowOption = None,
    decay: DecayOption = None,
    window_memory: WindowMemoryOption = None,
    window_tolerance: WindowToleranceOption = None,
    layers: LayersOption = None,
    approximations: ApproximationsOption = None,
    metrics: MetricsOption = None,
    estimates: EstimatesOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    plugin: PluginOption = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in --out from its checkpoint, or start it."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run in --out and start anew.")
    ] = False,
    keep_checkpoints: Annotated[
        Keep, typer.Option(help="Checkpoints to keep: the last, or one at every probed step.")
    ] = Keep.LAST,
) -> None:
    """Train WORKLOAD with an optimizer and probe every layer along the way."""
    with exit_codes():
        with usage_checked():
            load_plugins(plugin)
            from kronecker_probe.cli.several import check_several, options_of_each, track_several
            from kronecker_probe.tracking.training import Training, TrainingOptions
            from kronecker_probe.workloads import load_workload

            loaded = load_workload(workload, seed)
            _set_threads(threads or loaded.threads)
            options = TrainingOptions(
                steps=steps if steps is not None else loaded.steps,
                batch_size=batch_size if batch_size is not None else loaded.batch_size,
                lr=lr,
                settings=_settings(settings, precondition_frequency),
                probes=probes,
                spacing=spacing.value,
                probe_offset=probe_offset,
                probe_size=probe_size,
                target=target.value if target is not None else loaded.target,
                layers=tuple(layers) if layers is not None else loaded.layers,
                seed=seed,
                device=device,
                label_draws=label_draws,
                target_batch_size=target_batch_size,
                window=window,
                decay=decay,
                window_memory=window_memory,
                window_tolerance=window_tolerance,
                approximations=_names(approximations),
                metrics=_names(metrics),
                estimates=_names(estimates),
            )
            directory = out if out is not None else Path("runs") / workload.replace(":", ".")
            each = options_of_each(options, optimizer, loaded.lr)
            if len(each) > 1:
                check_several(loaded, workload, directory, each, resume=resume, overwrite=overwrite)
            else:
                training = Training(
                    loaded,
                    workload,
                    directory,
                    each[0],
                    resume=resume,
                    overwrite=overwrite,
                    keep_checkpoints=keep_checkpoints.value,
                )
        if len(each) > 1:
            comparison, diverged = track_several(
                workload,
                directory,
                each,
                resume=resume,
                overwrite=overwrite,
                keep_checkpoints=keep_checkpoints.value,
            )
            show_comparison(comparison)
            raise typer.Exit(FAILED if diverged else DONE)
        show_probes(training.probed)
        with resumable(training), progress_shown(options.steps) as show:
            training.run(show)
        show_run(directory)


def _names(given: list[str] | None) -> tuple[str, ...] | None:
    return tuple(given) if given else None


def _settings(given: list[str] | None, frequency: int | None) -> tuple[str, ...]:
    every = () if frequency is None else (f"basis.frequency={frequency}",)
    return (*every, *(given or ()))


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


@app.command()
def measure(
    workload: WorkloadName,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights from a run, one of its checkpoints/*.safetensors. Default: freshly "
            "initialized.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Also write a run directory with table, figures and report.",
            show_default=False,
        ),
    ] = None,
    probe_size: ProbeSizeOption = 200,
    target: TargetOption = None,
    label_draws: LabelDrawsOption = 1,
    target_batch_size: TargetBatchSizeOption = None,
    layers: LayersOption = None,
    approximations: ApproximationsOption = None,
    metrics: MetricsOption = None,
    estimates: EstimatesOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    plugin: PluginOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run in --out first.")
    ] = False,
) -> None:
    """Measure WORKLOAD once, at initialization or at a checkpoint."""
    with exit_codes():
        with usage_checked():
            load_plugins(plugin)
            from kronecker_probe.tracking.tracker import Tracker
            from kronecker_probe.tracking.training import ending_noted, torch_device
            from kronecker_probe.tracking.training_state import load_model, load_training_state
            from kronecker_probe.workloads import load_workload

            if target is Target.TRAJECTORY:
                raise InvalidInputError(
                    "--target trajectory is made of a run's own gradients; use 'track'."
                )
            loaded = load_workload(workload, seed)
            _set_threads(threads or loaded.threads)
            if target is Target.BATCH_GRADIENT and target_batch_size is None:
                target_batch_size = loaded.batch_size
            where = torch_device(device)
            step = 0
            if checkpoint is not None:
                state = load_training_state(checkpoint)
                load_model(loaded.model, state, checkpoint)
                step = state.tracker.steps_taken
            inputs, targets = loaded.probe(probe_size, seed)
            if overwrite and out is None:
                raise InvalidInputError("--overwrite needs --out.")
            tracker = Tracker(
                loaded.model.to(where),
                loaded.loss_fn,
                out=out,
                probe=(inputs.to(where), targets.to(where)),
                target=target.value if target is not None else loaded.target,
                layers=layers if layers is not None else loaded.layers,
                seed=seed,
                label_draws=label_draws,
                target_batch_size=target_batch_size,
                approximations=_names(approximations),
                metrics=_names(metrics),
                estimates=_names(estimates),
                config={
                    "workload": workload,
                    "checkpoint": None if checkpoint is None else str(checkpoint),
                    "probe_size": probe_size,
                },
                overwrite=overwrite,
                start=step,
            )
        with ending_noted(tracker):
            tracker.finish()
        if out is not None:
            show_run(out)
        else:
            show_table(tracker.table, asked=metrics is not None)


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run directory, or one of several optimizers.")
    ],
    plugin: PluginOption = None,
) -> None:
    """Redraw every figure and report.html of RUN from its stored table (needs no torch)."""
    with exit_codes():
        with usage_checked():
            load_plugins(plugin)
            from kronecker_probe.report.comparison import Comparison
            from kronecker_probe.report.run_page import write_report
            from kronecker_probe.tracking.run_directory.store import RunStore

            if Comparison.holds(run):
                comparison = Comparison.open(run)
                for store in comparison.stores().values():
                    if store.steps():
                        write_report(store.path)
                show_comparison(comparison)
                return
            RunStore.open(run)
        show_run(run)


@app.command()
def workloads(plugin: PluginOption = None) -> None:
    """List the workloads, built-in and of plugins."""
    with exit_codes():
        with usage_checked():
            load_plugins(plugin)
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
