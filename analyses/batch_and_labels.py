"""Do mini-batch gradients and true labels spoil Shampoo's statistics as an estimate of H_GN?

An optimizer sees the mean gradient of a batch at the true labels, not single gradients at labels
sampled from the model. With mu = E[g], batches of B data drawn with replacement have

    E[gbar gbar^T] = E[g g^T] / B + (1 - 1/B) mu mu^T

(Morwani et al., 2024, arXiv 2406.17748). At sampled labels mu = 0, so that the batch size changes
the scale alone. At true labels the mean gradient enters, and the factors drift away from H_GN as
B grows, where the mean is large beside the noise of single gradients.

A three-layer network on ten digits is trained with the embedded Shampoo. At three stages
Shampoo^2 is built from batch gradients and compared with the exact H_GN of the same data: from
the relation above without drawing any batch, and from batches that are really drawn.

The table (batch_and_labels.csv) has one cosine a row: ``labels`` true or sampled, ``how`` exact
or drawn, for each seed, step, parameter and batch size. "best" rows are the optimal Kronecker
product of H_GN, and "single" rows its own Shampoo^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track

import kronecker_probe as kp
from kronecker_probe.cli.analysis import Script
from kronecker_probe.plots.panels import GREY, Panels
from kronecker_probe.workloads import load_workload

NAME, WORKLOAD = "batch_and_labels", "digits-mlp"
CAPTURE_TARGETS = {"true": "empirical-fisher", "sampled": "fisher"}
# Okabe and Ito's vermillion and blue, with markers that differ, too
LOOKS = {"true": ("#d55e00", "^"), "sampled": ("#0072b2", "o")}

Row = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """How much is measured.

    Attributes:
        seeds: Seeds 0, 1, ... of model, training and draws.
        steps: Stages of the training.
        sizes: Batch sizes of the exact relation.
        drawn_sizes: Batch sizes that are drawn as well.
        batches: Batches drawn for each.
        data: Data of the probe set.
        label_draws: Sampled labels a datum.
    """

    seeds: int
    steps: tuple[int, ...]
    sizes: tuple[int, ...]
    drawn_sizes: tuple[int, ...]
    batches: int
    data: int
    label_draws: int


PRESETS = {
    "quick": Preset(1, (0, 100), (1, 16, 256, 4096), (1, 64), 256, 256, 8),
    "default": Preset(
        3, (0, 100, 1600), tuple(4**k for k in range(7)), (1, 16, 256), 512, 1024, 32
    ),
}


def collect(preset: Preset) -> pd.DataFrame:
    """The table: every seed and step, one cosine a row."""
    rows: list[Row] = []
    for seed in track(range(preset.seeds), description="seeds"):
        rows += run(seed, preset)
    return pd.DataFrame(rows)


def run(seed: int, preset: Preset) -> Iterator[Row]:
    """Train once and measure at the stages."""
    workload = load_workload(WORKLOAD, seed)
    torch.set_num_threads(workload.threads or torch.get_num_threads())
    optimizer = kp.optim.Shampoo(workload.model.named_parameters(), lr=workload.lr)
    for step in range(max(preset.steps) + 1):
        if step in preset.steps:
            for row in stage(workload, seed, preset):
                yield {"seed": seed, "step": step} | row
        inputs, targets = workload.batch(step, workload.batch_size, seed)
        optimizer.zero_grad()
        workload.loss_fn(workload.model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def stage(workload: kp.Workload, seed: int, preset: Preset) -> Iterator[Row]:
    """All cosines to H_GN at the weights as they are."""
    model, loss_fn, data = workload.model, workload.loss_fn, workload.probe(preset.data, seed)

    def captured(target: str, label_draws: int = 1) -> kp.Capture:
        return kp.capture(
            model, loss_fn, data, target, workload.layers, seed=seed, label_draws=label_draws
        )

    targets = {name: kp.SecondMoment(one) for name, one in captured("ggn").items()}
    for name, H in targets.items():
        for how, approximation in (("best", "optimal"), ("single", "shampoo-squared")):
            cosine = kp.cosine_similarity(H, kp.approximate(H, approximation))
            yield {"parameter": name, "how": how, "cosine": cosine}
    for labels, draws in CAPTURE_TARGETS.items():
        samples = captured(draws, preset.label_draws if labels == "sampled" else 1)
        plans: list[tuple[str, int, int | None]] = [("exact", size, None) for size in preset.sizes]
        plans += [("drawn", size, preset.batches) for size in preset.drawn_sizes]
        for how, size, batches in plans:
            batch = kp.batch_gradients(samples, size, batches, seed=seed)
            for name, H in targets.items():
                P = kp.approximate(kp.SecondMoment(batch[name]), "shampoo-squared")
                shared = {"parameter": name, "labels": labels, "how": how, "batch_size": size}
                yield shared | {"cosine": kp.cosine_similarity(H, P)}


def losses(table: pd.DataFrame) -> pd.DataFrame:
    """Cosine lost from single gradients to each batch size, exactly: columns true and sampled."""
    exact = table[table["how"] == "exact"]
    wide = exact.set_index(["seed", "step", "parameter", "batch_size", "labels"])["cosine"]
    levels = ["seed", "step", "parameter"]
    return wide.unstack("labels").groupby(levels, group_keys=False).apply(_lost)


def _lost(one: pd.DataFrame) -> pd.DataFrame:
    return one.iloc[0] - one


def headline(table: pd.DataFrame) -> str:
    """What the labels and the batch size cost, over all layers: the range over stages."""
    lost = losses(table)
    size = table["batch_size"].max()
    at = lost.xs(size, level="batch_size")
    worst = at["true"].groupby(["step", "seed"]).max().groupby("step").median()
    stages = ", ".join(f"{value:.2f} at step {step}" for step, value in worst.items())
    sampled = lost["sampled"].abs().max()
    change = "at all" if sampled < 5e-4 else f"by more than {sampled:.3f}"
    return (
        "At sampled labels the batch size does not change Shampoo²'s cosine to H_GN "
        f"{change}; at true labels batches of {size:.0f} lose up to {stages}"
    )


def draw(table: pd.DataFrame) -> Figure:
    """A row a stage, a column a layer; lines are the relation, markers drawn batches."""
    steps, layers = table["step"].unique(), table["parameter"].unique()
    figure = Figure()
    panels = Panels.make(
        len(steps) * len(layers), None, figure, width=3.2, height=2.5, columns=len(layers)
    )
    places = [(step, layer) for step in steps for layer in layers]
    for ax, (step, layer) in zip(panels.axes, places, strict=True):
        one = table[(table["step"] == step) & (table["parameter"] == layer)]
        ax.set_title(f"step {step}, {layer}", fontsize=9, loc="left")
        best = one.loc[one["how"] == "best", "cosine"].median()
        ax.axhline(best, color="#000000", linewidth=2.5, label="optimal product")
        for labels, (color, marker) in LOOKS.items():
            _curve(ax, one[one["labels"] == labels], labels, color, marker)
        ax.set_xscale("log", base=4)
        ax.set_xticks([1, 16, 256, 4096], ["1", "16", "256", "4096"])
        ax.set_ylim(0.0, 1.03)
    note = "median and range of the seeds;\nso few drawn batches fall short of the limit"
    first = panels.axes[0]
    first.text(0.03, 0.06, note, fontsize=7, color=GREY, transform=first.transAxes)
    panels.finish(headline(table), "batch size B", "Shampoo²'s cosine to H_GN", legend=True)
    return figure


def _curve(ax: Axes, rows: pd.DataFrame, labels: str, color: str, marker: str) -> None:
    exact, drawn = (
        rows[rows["how"] == how].groupby("batch_size")["cosine"].agg(["min", "median", "max"])
        for how in ("exact", "drawn")
    )
    ax.fill_between(exact.index, exact["min"], exact["max"], color=color, alpha=0.2, linewidth=0)
    ax.plot(exact.index, exact["median"], color=color, label=f"{labels} labels, exact")
    ax.plot(drawn.index, drawn["median"], color=color, marker=marker, linestyle="", markersize=5,
            markeredgecolor="white", label=f"{labels} labels, drawn")  # fmt: skip


SCRIPT = Script(
    NAME, __doc__.splitlines()[0], PRESETS, collect, draw, lambda table: (headline(table),)
)

if __name__ == "__main__":
    SCRIPT.main()
