"""The options that commands share, with their help texts."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


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


WorkloadName = Annotated[
    str,
    typer.Argument(
        metavar="WORKLOAD", help="Built-in name (see 'workloads') or package.module:factory."
    ),
]
TargetOption = Annotated[
    Target | None,
    typer.Option(
        metavar="TARGET",
        help="Which gradients H is made of: ggn (exact Gauss-Newton), fisher (labels sampled from "
        "the model), empirical-fisher (true labels), batch-gradient (means over batches, true "
        "labels), trajectory (the run's own gradients; track only). Default: the workload's.",
        show_default=False,
    ),
]
LabelDrawsOption = Annotated[
    int, typer.Option(metavar="N", min=1, help="Label samples per example, for --target fisher.")
]
TargetBatchSizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Examples per batch, for --target batch-gradient. Default: the training's batch size.",
        show_default=False,
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Gradients to keep, for --target trajectory. Default: 200.",
        show_default=False,
    ),
]
DecayOption = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Average the gradients of --target trajectory with this decay, the optimizer's beta2. "
        "Default: their sum, as in AdaGrad.",
        show_default=False,
    ),
]
WindowToleranceOption = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        min=0.0,
        help="Share of the gradients' energy that --target trajectory may leave out, to be faster; "
        "the table says how much that is. 0 for exact. Default: 0.001.",
        show_default=False,
    ),
]
WindowMemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory that the window of --target trajectory may take; beyond it the window keeps "
        "low-rank factors, and the table says what they leave out. Default: 1GB.",
        show_default=False,
    ),
]
LayersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--layers",
        metavar="GLOB",
        help="Glob of parameter names; may be repeated. Default: the workload's.",
        show_default=False,
    ),
]
ApproximationsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--approximations",
        metavar="SPEC",
        help="Name or spec to score, as 'divergence:q=0' or 'optimal:rank=2' "
        "(see docs/approximations.md); may be repeated. Default: the usual six.",
        show_default=False,
    ),
]
MetricsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--metrics",
        metavar="SPEC",
        help="Metric, as 'cosine' or 'kl_divergence:damping=0.01' (docs/metrics.md); may be "
        "repeated. Only the cosine, the relative errors and the best scale have estimates; all "
        "others are of the sample matrix, whatever --estimates says. Default: those four.",
        show_default=False,
    ),
]
EstimatesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--estimates",
        metavar="KIND",
        help="plugin (the sample matrix itself), held-out (factors of half of the examples, scored "
        "on the rest), population (the limit of many examples, with error bars); may be repeated. "
        "Default: plugin and population.",
        show_default=False,
    ),
]
DEFAULT_OPTIMIZERS = ["shampoo"]
OptimizerOption = Annotated[
    list[str],
    typer.Option(
        metavar="NAME",
        help="shampoo, shampoo-squared, eshampoo, soap, kl-shampoo, kl-soap, root-free-shampoo, "
        "inverse-free-shampoo, rmsprop-root-free, adagrad-root-free, kfac, ekfac, muon; or torch's "
        "adamw, adam, sgd, rmsprop, adagrad. May be repeated: a run each in --out/NAME, and "
        "their comparison.",
    ),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="X=Y",
        help="A setting of the optimizer, such as weight_decay=0.01 or basis.tolerance=0.1; of one "
        "of several: soap:basis.tolerance=0.1, adamw:lr=3e-3. May be repeated "
        "(docs/optimizers.md).",
        show_default=False,
    ),
]
PluginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="MODULE",
        help="Your module (package.module or a file .py) that registers approximations, metrics, "
        "layer rules, workloads, ...; may be repeated (CONTRIBUTING.md).",
        show_default=False,
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=0,
        callback=_seed,
        help="Seed of model, batches, probe set and sampled labels.",
    ),
]
ProbeSizeOption = Annotated[
    int,
    typer.Option(
        metavar="N", min=1, help="Examples in the fixed probe set, taken from the training set."
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="CPU threads of torch. Default: the workload's, else torch's own choice.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str, typer.Option(metavar="NAME", help="Torch device: cpu, cuda, cuda:1, ...")
]
