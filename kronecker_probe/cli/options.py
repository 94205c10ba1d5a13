"""The options of the commands, each declared once, and how a command takes them; no torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

Given = TypeVar("Given")


class Target(StrEnum):
    """Which gradients the second moment is made of."""

    GGN = "ggn"
    FISHER = "fisher"
    EMPIRICAL = "empirical-fisher"
    BATCH_GRADIENT = "batch-gradient"
    TRAJECTORY = "trajectory"


class Spacing(StrEnum):
    """How the probed steps are spread over the run."""

    EARLY = "early"
    EVEN = "even"


class Keep(StrEnum):
    """Which checkpoints stay."""

    LAST = "last"
    ALL = "all"


class Preset(StrEnum):
    """How long an analysis may take."""

    QUICK = "quick"
    DEFAULT = "default"


def _seed(value: int) -> int:
    """Seeds as torch takes them; no ``max=``, whose nineteen digits the help would print."""
    if value >= 2**63:
        raise typer.BadParameter(f"{value} is not below 2**63.")
    return value


def _unset(metavar: str, text: str, *names: str, **limits: Any) -> Any:
    """An option whose default the help text says in words."""
    return typer.Option(*names, metavar=metavar, help=text, show_default=False, **limits)


@dataclass(frozen=True, kw_only=True)
class PluginOptions:
    """What every command takes that knows names which users register."""

    plugin: Annotated[
        list[str] | None,
        _unset(
            "MODULE",
            "Your module (package.module or a file .py) that registers approximations, metrics, "
            "layer rules, workloads, ...; may be repeated (CONTRIBUTING.md).",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(PluginOptions):
    """What is measured, and how."""

    workload: Annotated[
        str,
        typer.Argument(
            metavar="WORKLOAD", help="Built-in name (see 'workloads') or package.module:factory."
        ),
    ]
    probe_size: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Examples in the fixed probe set, taken from the training set."
        ),
    ] = 200
    target: Annotated[
        Target | None,
        _unset(
            "TARGET",
            "Which gradients H is made of: ggn (exact Gauss-Newton), fisher (labels sampled from "
            "the model), empirical-fisher (true labels), batch-gradient (means over batches, true "
            "labels), trajectory (the run's own gradients; track only). Default: the workload's.",
        ),
    ] = None
    label_draws: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Label samples per example, for --target fisher."),
    ] = 1
    target_batch_size: Annotated[
        int | None,
        _unset(
            "N",
            "Examples per batch, for --target batch-gradient. Default: the training's batch size.",
            min=1,
        ),
    ] = None
    layers: Annotated[
        list[str] | None,
        _unset("GLOB", "Glob of parameter names; may be repeated. Default: the workload's."),
    ] = None
    approximations: Annotated[
        list[str] | None,
        _unset(
            "SPEC",
            "Name or spec to score, as 'divergence:q=0' or 'optimal:rank=2' "
            "(see docs/approximations.md); may be repeated. Default: the usual six.",
        ),
    ] = None
    metrics: Annotated[
        list[str] | None,
        _unset(
            "SPEC",
            "Metric, as 'cosine' or 'kl_divergence:damping=0.01' (docs/metrics.md); may be "
            "repeated. Only the cosine, the relative errors and the best scale have estimates; all "
            "others are of the sample matrix, whatever --estimates says. Default: those four.",
        ),
    ] = None
    estimates: Annotated[
        list[str] | None,
        _unset(
            "KIND",
            "plugin (the sample matrix itself), held-out (factors of half of the examples, scored "
            "on the rest), population (the limit of many examples, with error bars); may be "
            "repeated. Default: plugin and population.",
        ),
    ] = None
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            callback=_seed,
            help="Seed of model, batches, probe set and sampled labels.",
        ),
    ] = 0
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Torch device: cpu, cuda, cuda:1, ...")
    ] = "cpu"
    threads: Annotated[
        int | None,
        _unset(
            "N", "CPU threads of torch. Default: the workload's, else torch's own choice.", min=1
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class TrackOptions(ProbeOptions):
    """Of ``track``."""

    out: Annotated[Path | None, _unset("DIR", "Run directory. Default: runs/WORKLOAD.")] = None
    steps: Annotated[
        int | None, _unset("N", "Optimizer steps. Default: the workload's.", min=1)
    ] = None
    batch_size: Annotated[
        int | None, _unset("N", "Examples per step. Default: the workload's.", min=1)
    ] = None
    lr: Annotated[
        float | None,
        _unset(
            "X",
            "Learning rate. Default: the workload's, for steps as long as Adam's; else the "
            "optimizer's. One of several optimizers has its own by --set NAME:lr=X.",
            min=0.0,
        ),
    ] = None
    optimizer: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="shampoo, shampoo-squared, eshampoo, soap, kl-shampoo, kl-soap, "
            "root-free-shampoo, inverse-free-shampoo, rmsprop-root-free, adagrad-root-free, kfac, "
            "ekfac, muon; or torch's adamw, adam, sgd, rmsprop, adagrad. May be repeated: "
            "a run each in --out/NAME, and their comparison.",
        ),
    ] = field(default_factory=lambda: ["shampoo"])
    settings: Annotated[
        list[str] | None,
        _unset(
            "X=Y",
            "A setting of the optimizer, such as weight_decay=0.01 or basis.tolerance=0.1; of one "
            "of several: soap:basis.tolerance=0.1, adamw:lr=3e-3. May be repeated "
            "(docs/optimizers.md).",
            "--set",
        ),
    ] = None
    precondition_frequency: Annotated[
        int | None, _unset("N", "Steps between refreshes: --set basis.frequency=N.", min=1)
    ] = None
    probes: Annotated[
        int,
        typer.Option(metavar="N", min=2, help="Number of probed steps, first and last included."),
    ] = 21
    spacing: Annotated[
        Spacing, typer.Option(help="Probed steps: more of them early in the run, or even.")
    ] = Spacing.EARLY
    probe_offset: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Steps by which all probes but the first and last are moved, to fall between "
            "refreshes.",
        ),
    ] = 0
    window: Annotated[
        int | None,
        _unset("N", "Gradients to keep, for --target trajectory. Default: 200.", min=1),
    ] = None
    decay: Annotated[
        float | None,
        _unset(
            "X",
            "Average the gradients of --target trajectory with this decay, the optimizer's beta2. "
            "Default: their sum, as in AdaGrad.",
        ),
    ] = None
    window_memory: Annotated[
        str | None,
        _unset(
            "SIZE",
            "Memory that the window of --target trajectory may take; beyond it the window keeps "
            "low-rank factors, and the table says what they leave out. Default: 1GB.",
        ),
    ] = None
    window_tolerance: Annotated[
        float | None,
        _unset(
            "X",
            "Share of the gradients' energy that --target trajectory may leave out, to be faster; "
            "the table says how much that is. 0 for exact. Default: 0.001.",
            min=0.0,
        ),
    ] = None
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in --out from its checkpoint, or start it."
        ),
    ] = False
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run in --out and start anew.")
    ] = False
    keep_checkpoints: Annotated[
        Keep, typer.Option(help="Checkpoints to keep: the last, or one at every probed step.")
    ] = Keep.LAST


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(ProbeOptions):
    """Of ``measure``."""

    checkpoint: Annotated[
        Path | None,
        _unset(
            "FILE",
            "Weights from a run, one of its checkpoints/*.safetensors. Default: freshly "
            "initialized.",
        ),
    ] = None
    out: Annotated[
        Path | None,
        _unset("DIR", "Also write a run directory with table, figures and report."),
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run in --out first.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class ReportOptions(PluginOptions):
    """Of ``report``."""

    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run directory, or one of several optimizers.")
    ]


def taking_options(command: Callable[[Given], None]) -> Callable[..., None]:
    """A command of one dataclass of options as typer wants it: a parameter for each field."""
    (kind,) = (hint for name, hint in get_type_hints(command).items() if name != "return")
    hints, known = get_type_hints(kind, include_extras=True), {f.name: f for f in fields(kind)}
    own_first = [name for one in kind.__mro__ for name in inspect.get_annotations(one)]
    parameters = []
    for name in own_first:
        default, factory = known[name].default, known[name].default_factory
        if factory is not MISSING:
            default = factory()
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is MISSING else default,
                annotation=hints[name],
            )
        )

    def call(**values: Any) -> None:
        command(kind(**values))

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call
