"""Are Shampoo's factors right for what they accumulate, and is that the Gauss-Newton matrix?

Shampoo's factors average gradients along a run. Two matrices can be meant by "the" target: H_GN,
the Gauss-Newton matrix at the present weights, and H_Ada, the average of g g^T over the gradients
that training has really seen (full-matrix Adam; Morwani et al., 2024, arXiv 2406.17748; Purifying
Shampoo, arXiv 2506.03595). No factor can be near both if they are far from each other.

A three-layer network on ten digits is trained with the embedded Shampoo, whose statistics decay
by beta2 = 0.99. A window of its last 500 gradients with the same decay (it leaves out 0.7% of the
average's weight) holds H_Ada; H_GN is exact, on a fixed part of the training set.

The table (adagrad_view.csv) has one cosine a row, for each seed, step and parameter: of an
``approximation`` built from the ``target`` "gn" or "ada" to that target; of the "in-use" operator,
which the optimizer holds, to each; and, as approximation "other", of the two targets to each
other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.progress import track

import kronecker_probe as kp
from kronecker_probe.cli.analysis import Script
from kronecker_probe.plots.panels import Panels, Style, style
from kronecker_probe.table.read import short
from kronecker_probe.workloads import load_workload

NAME, WORKLOAD = "adagrad_view", "digits-mlp"
BETAS, WINDOW = (0.9, 0.99), 500
APPROXIMATIONS = ("optimal", "shampoo-squared", "shampoo")
TARGETS = {"gn": "H_GN", "ada": "H_Ada"}
OTHER = "other"

Row = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """How much is measured.

    Attributes:
        seeds: Seeds 0, 1, ... of model, batches and probe set.
        steps: Measured steps; the last ends the training.
        data: Data of the probe set.
    """

    seeds: int
    steps: tuple[int, ...]
    data: int


PRESETS = {
    "quick": Preset(1, (20, 100, 400), 256),
    "default": Preset(3, (20, 50, 100, 200, 400, 800, 1600, 3200), 1024),
}


def collect(preset: Preset) -> pd.DataFrame:
    """The table: every seed and step, one cosine a row."""
    rows: list[Row] = []
    for seed in track(range(preset.seeds), description="seeds"):
        rows += run(seed, preset)
    return pd.DataFrame(rows)


def run(seed: int, preset: Preset) -> Iterator[Row]:
    """Train once; the window records every gradient, the targets are compared at the steps."""
    workload = load_workload(WORKLOAD, seed)
    torch.set_num_threads(workload.threads or torch.get_num_threads())
    model = workload.model
    optimizer = kp.optim.Shampoo(model.named_parameters(), lr=workload.lr, betas=BETAS)
    window = kp.GradientWindow(model, WINDOW, decay=BETAS[1], layers=workload.layers)
    window.attach(optimizer)
    data = workload.probe(preset.data, seed)
    for step in range(1, max(preset.steps) + 1):
        inputs, targets = workload.batch(step - 1, workload.batch_size, seed)
        optimizer.zero_grad()
        workload.loss_fn(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step in preset.steps:
            curvature = kp.capture(model, workload.loss_fn, data, layers=workload.layers)
            along = window.samples()
            for name, parameter in model.named_parameters():
                if name in curvature:
                    pair = {"gn": curvature[name], "ada": along[name]}
                    live = optimizer.operator(parameter)
                    for row in compare(pair, live):
                        yield {"seed": seed, "step": step, "parameter": name} | row


def compare(pair: dict[str, kp.GradientSamples], live: Any) -> Iterator[Row]:
    """The cosines of one layer at one step."""
    moments = {target: kp.SecondMoment(samples) for target, samples in pair.items()}
    for target, H in moments.items():
        operators = {name: kp.approximate(H, name) for name in APPROXIMATIONS}
        for name, P in (operators | {"in-use": live}).items():
            cosine = kp.cosine_similarity(H, P)
            yield {"target": target, "approximation": name, "cosine": cosine}
    between = kp.cosine_similarity(moments["gn"], moments["ada"])
    yield {"approximation": OTHER, "cosine": between}


def headline(table: pd.DataFrame) -> str:
    """How near Shampoo^2 is to the optimum for each target, and the targets to each other."""
    keys = ["seed", "step", "parameter", "target", "approximation"]
    wide = table.set_index(keys)["cosine"].unstack("approximation")
    gap = (wide["optimal"] - wide["shampoo-squared"]).groupby("target").max()
    between = table.loc[table["approximation"] == OTHER, "cosine"]
    return (
        f"Shampoo² is within {gap['gn']:.2f} of the optimum for H_GN and {gap['ada']:.2f} for "
        f"H_Ada, but the two targets themselves have cosine {between.min():.2f} to "
        f"{between.max():.2f}: what the factors accumulate is another matrix"
    )


def draw(table: pd.DataFrame) -> Figure:
    """A column a layer; rows: H_GN, H_Ada, and what lies between them."""
    layers, steps = table["parameter"].unique(), sorted(table["step"].unique())
    figure = Figure()
    panels = Panels.make(3 * len(layers), None, figure, width=3.4, height=2.4, columns=len(layers))
    grid = panels.axes.reshape(3, len(layers))
    for column, layer in enumerate(layers):
        one = table[table["parameter"] == layer]
        for ax, (target, name) in zip(grid[:2, column], TARGETS.items(), strict=True):
            ax.set_title(f"{layer}: cosine to {name}", fontsize=9, loc="left")
            rows = one[one["target"] == target]
            for approximation in (*APPROXIMATIONS, "in-use"):
                look = style(approximation)
                _line(ax, rows, approximation, look, short(approximation))
        ax = grid[2, column]
        ax.set_title(f"{layer}: H_Ada against H_GN", fontsize=9, loc="left")
        _line(ax, one, OTHER, Style("#000000", "D", (0, (4, 2))), "cosine of H_Ada to H_GN")
    for ax in grid.ravel():
        ax.set_xscale("log")
        ax.set_xticks(steps, [str(step) for step in steps])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_ylim(0.0, 1.03)
    panels.finish(headline(table), "optimizer step", "cosine", legend=True)
    return figure


def _line(ax: Axes, rows: pd.DataFrame, approximation: str, look: Style, text: str) -> None:
    """Median over the seeds with the range shaded."""
    chosen = rows[rows["approximation"] == approximation]
    over = chosen.groupby("step")["cosine"].agg(["min", "median", "max"])
    ax.fill_between(over.index, over["min"], over["max"], color=look.color, alpha=0.2, linewidth=0)
    ax.plot(over.index, over["median"], color=look.color, linestyle=look.line,
            marker=look.marker, markersize=4.5, label=text)  # fmt: skip


SCRIPT = Script(
    NAME, __doc__.splitlines()[0], PRESETS, collect, draw, lambda table: (headline(table),)
)

if __name__ == "__main__":
    SCRIPT.main()
