"""The options that commands share, with their help texts."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Draws(StrEnum):
    """Which gradients the second moment is made of."""

    GGN = "ggn"
    FISHER = "fisher"
    EMPIRICAL = "empirical-fisher"


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


WorkloadName = Annotated[
    str,
    typer.Argument(
        metavar="WORKLOAD", help="Built-in name (see 'workloads') or package.module:factory."
    ),
]
DrawsOption = Annotated[
    Draws | None,
    typer.Option(
        help="Gradients to draw: ggn (exact Gauss-Newton), fisher (labels sampled from the "
        "model), empirical-fisher (true labels). Default: the workload's.",
        show_default=False,
    ),
]
LayersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--layers",
        help="Glob of parameter names; may be repeated. Default: the workload's.",
        show_default=False,
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(
        min=0, max=2**63 - 1, help="Seed of model, batches, probe set and sampled labels."
    ),
]
ProbeSizeOption = Annotated[
    int, typer.Option(min=1, help="Data in the fixed probe set (training data are used).")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="CPU threads of torch. Default: the workload's, else torch's own choice.",
        show_default=False,
    ),
]
DeviceOption = Annotated[str, typer.Option(help="Torch device: cpu, cuda, cuda:1, ...")]
