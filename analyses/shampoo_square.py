"""Is the square of Shampoo's approximation near the optimal Kronecker product of H_GN?

Morwani et al. (2024, arXiv 2406.17748) find that L kron R, the square of what Shampoo takes for
the Gauss-Newton matrix, is nearly its optimal Kronecker product all along training, while
Shampoo's own L^{1/2} kron R^{1/2} is not. They explain it by power iteration on R(H): L and R
are one round from the identity, and the identity start widens the gap between the first singular
value and the others.

Two workloads on real images, trained with the embedded Shampoo and measured at steps that are
evenly spaced on a log scale, over seeds: logistic regression on two digits (as two-class
cross-entropy) and a three-layer network on ten.

The table (shampoo_square.csv) has one number a row, with the metrics

* ``cosine`` of an approximation to H_GN; that of the optimum is sigma_1 / |H|, too;
* ``sigma1_ratio``: sigma_1 / |H| = sigma_1 / sqrt(sum_i sigma_i^2), from the spectrum of R(H);
* ``identity_start_left``: the same ratio after the identity start. With alpha_i = <V_i, I/sqrt(n)>
  it is alpha_1 sigma_1 / sqrt(sum_i alpha_i^2 sigma_i^2). Because R(H) vec(I) = vec(L), this is
  the cosine of L to U_1, which is how it is computed; ``identity_start_right`` is that of R to V_1;
* ``loss`` and ``accuracy`` on the measured data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.progress import track
from torch import Tensor

import kronecker_probe as kp
from kronecker_probe.cli.analysis import Script
from kronecker_probe.plots.panels import GREY, Panels, Style, limits, style
from kronecker_probe.table.read import label
from kronecker_probe.workloads import load_workload

NAME = "shampoo_square"
APPROXIMATIONS = ("optimal", "shampoo-squared", "kfac", "shampoo")
# of the palette, by what they belong to: the optimum's ratio, and the factors of Shampoo^2
RATIOS = {
    "sigma1_ratio": ("σ₁/‖H‖", style("optimal")),
    "identity_start_left": ("identity start: cos(L, U₁)", style("shampoo-squared")),
    "identity_start_right": (
        "identity start: cos(R, V₁)",
        replace(style("shampoo-squared"), marker="s", line=(0, (5, 2))),
    ),
}
TITLES = {"digits-logistic": "logistic regression, digits 3 and 8", "digits-mlp": "MLP, ten digits"}
ACCURACY = 0.9  # the first step with so much on the training set is marked
KEYS = ["workload", "seed", "n_examples", "parameter", "step"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """How much is measured.

    Attributes:
        seeds: Seeds 0, 1, ... of model, batches and probe set.
        probes: Probed steps, at most; small steps on a log scale may coincide.
        probe_sizes: Sizes of the nested probe sets; None is the whole training set.
        steps: Optimizer steps; None is the workload's number.
    """

    seeds: int
    probes: int
    probe_sizes: tuple[int | None, ...]
    steps: int | None = None


PRESETS = {
    "quick": Preset(seeds=2, probes=9, probe_sizes=(256,)),
    # the small probe set beside the whole one shows what the number of samples does
    "default": Preset(seeds=5, probes=20, probe_sizes=(256, None)),
}


def collect(preset: Preset) -> pd.DataFrame:
    """The table: every workload and seed, one number a row."""
    runs = [(name, seed) for name in TITLES for seed in range(preset.seeds)]
    rows: list[Row] = []
    for name, seed in track(runs, description="runs"):
        rows += run(name, seed, preset)
    table = pd.DataFrame(rows)
    return table[[*KEYS, "m", "n", "approximation", "metric", "value"]]


def run(name: str, seed: int, preset: Preset) -> Iterator[Row]:
    """Train one workload and measure it along the way."""
    workload = load_workload(name, seed)
    torch.set_num_threads(workload.threads or torch.get_num_threads())
    model, loss_fn = workload.model, workload.loss_fn
    optimizer = kp.optim.Shampoo(model.named_parameters(), lr=workload.lr)
    total = workload.steps if preset.steps is None else preset.steps
    probed = log_steps(total, preset.probes)
    sizes = [size or len(workload.train[1]) for size in preset.probe_sizes]
    for step in range(total + 1):
        if step > 0:
            inputs, targets = workload.batch(step - 1, workload.batch_size, seed)
            optimizer.zero_grad()
            loss_fn(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if step in probed:
            for size in sizes:
                data = workload.probe(size, seed)
                shared = {"workload": name, "seed": seed, "n_examples": len(data[1]), "step": step}
                samples = kp.capture(model, loss_fn, data, "ggn", workload.layers)
                yield from (shared | row for row in measure(samples))


def log_steps(total: int, count: int) -> list[int]:
    """0 and at most ``count - 1`` steps from 1 to ``total``, evenly spaced on a log scale."""
    return [0, *np.unique(np.geomspace(1, total, count - 1).round().astype(int)).tolist()]


def measure(samples: kp.Capture) -> Iterator[Row]:
    """Cosines and ratios of every layer, and where the training stands."""
    for metric, value in (("loss", samples.loss), ("accuracy", samples.accuracy)):
        yield {"metric": metric, "value": value}
    for parameter, one in samples.items():
        H = kp.SecondMoment(one)
        m, n = H.shape
        shared = {"parameter": parameter, "m": m, "n": n}
        for name in APPROXIMATIONS:
            cosine = kp.cosine_similarity(H, kp.approximate(H, name))
            yield shared | {"approximation": name, "metric": "cosine", "value": cosine}
        for metric, value in ratios(H).items():
            yield shared | {"metric": metric, "value": value}


def ratios(H: kp.SecondMoment) -> dict[str, float]:
    """sigma_1 / |H|, and the same after the identity start, on the left and on the right."""
    best, square = kp.approximate(H, "optimal"), kp.approximate(H, "shampoo-squared")
    assert isinstance(best, kp.KroneckerOperator)
    assert isinstance(square, kp.KroneckerOperator)
    return {
        "sigma1_ratio": float(H.kronecker_spectrum(1)[0]) / H.norm(),
        "identity_start_left": _overlap(square.left, best.left),
        "identity_start_right": _overlap(square.right, best.right),
    }


def _overlap(A: Tensor, B: Tensor) -> float:
    return float((A * B).sum() / (A.norm() * B.norm()))


def widest(table: pd.DataFrame) -> pd.DataFrame:
    """The rows measured on each workload's largest probe set."""
    largest = table.groupby("workload")["n_examples"].transform("max")
    return table[table["n_examples"] == largest]


def cosines(table: pd.DataFrame) -> pd.DataFrame:
    """A row per (workload, seed, n_examples, parameter, step), a column per approximation."""
    rows = table[table["metric"] == "cosine"]
    return rows.set_index([*KEYS, "approximation"])["value"].unstack("approximation")


def headline(table: pd.DataFrame) -> str:
    """The finding: how far Shampoo^2 and Shampoo stay below the optimum, over all layers and steps.

    The numbers are the largest gap of Shampoo^2 and the smallest gap of Shampoo along each seed's
    runs: median and range over the seeds.
    """
    wide = cosines(widest(table))
    square = wide["optimal"] - wide["shampoo-squared"]
    own = wide["optimal"] - wide["shampoo"]
    optimum = "the optimal Kronecker product"
    if square.max() < own.min():
        verdict = f"Shampoo² stays nearer to {optimum} than Shampoo ever comes"
    elif (square < own).all():
        verdict = f"Shampoo² is nearer to {optimum} than Shampoo is, at every measurement"
    else:
        share = f"{(square < own).mean():.0%}"
        verdict = f"Shampoo² is nearer to {optimum} than Shampoo is in {share} of the measurements"
    largest, smallest = square.groupby("seed").max(), own.groupby("seed").min()
    return (
        f"{verdict}: at most {_spread(largest)} below its cosine to the Gauss-Newton matrix, "
        f"Shampoo at least {_spread(smallest)}; median (range) of {len(largest)} seeds"
    )


def explanation(table: pd.DataFrame) -> str:
    """The lowest ratio along each seed's runs, without and with the identity start."""
    shown = widest(table)
    lowest = [
        shown[shown["metric"].isin(metrics)].groupby("seed")["value"].min()
        for metrics in (["sigma1_ratio"], ["identity_start_left", "identity_start_right"])
    ]
    return (
        f"Explanation by power iteration: σ₁/‖H‖ is as low as {_spread(lowest[0])}; "
        f"after a start from the identity it is nowhere below {_spread(lowest[1])}"
    )


def _spread(values: pd.Series[float]) -> str:
    """Median and range, "0.010 (0.008–0.012)"."""
    return f"{values.median():.3f} ({values.min():.3f}–{values.max():.3f})"


def draw(table: pd.DataFrame) -> Figure:
    """Above the cosines, below the ratios; a column per layer, median and range of the seeds."""
    shown = widest(table)
    layers = shown.dropna(subset="parameter").drop_duplicates(["workload", "parameter"])
    count, figure = len(layers), Figure()
    panels = Panels.make(2 * count, None, figure, width=3.3, height=2.9, columns=count)
    rows = {"cosine": panels.axes[:count], "ratio": panels.axes[count:]}
    for top, bottom, layer in zip(*rows.values(), layers.itertuples(), strict=True):
        here = shown[shown["workload"] == layer.workload]
        one = here[here["parameter"] == layer.parameter]
        size = f"{layer.parameter} ({layer.m:.0f} × {layer.n:.0f})"
        top.set_title(
            f"{TITLES[layer.workload]}\n{size}, N = {layer.n_examples}", fontsize=9, loc="left"
        )
        bottom.set_title(" ", fontsize=9)  # room for the line across the row
        for number, name in enumerate(APPROXIMATIONS):
            _line(top, one[one["approximation"] == name], label(name), style(name), number)
        for number, (metric, (text, look)) in enumerate(RATIOS.items()):
            _line(bottom, one[one["metric"] == metric], text, look, number)
        _steps(top, here, text="")
        _steps(bottom, here, text=f"{ACCURACY:.0%} accuracy")
    _say_exact(rows["cosine"], layers)
    panels.finish("", "optimizer step", "cosine similarity to H", legend=False)
    verdict, numbers = headline(table).split(": ", 1)
    title = f"{verdict}:\n{numbers}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    for metrics, row in ((["cosine"], rows["cosine"]), (list(RATIOS), rows["ratio"])):
        view = limits(shown.loc[shown["metric"].isin(metrics), "value"].to_numpy(), "cosine")
        for ax in row:
            ax.set_ylim(view.low, view.high)
    first = rows["ratio"][0]
    first.set_ylabel("share of the first singular value", fontsize=9)
    first.text(
        0, 1.04, explanation(table), transform=first.transAxes, fontsize=10, weight="bold"
    ).set_in_layout(False)  # it runs across the row, over the room of the empty titles
    rows["cosine"][0].legend(fontsize=8, frameon=False, loc="lower left", handlelength=3)
    first.legend(
        fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, 0.85), handlelength=3
    )
    return figure


def _line(ax: Axes, rows: pd.DataFrame, text: str, look: Style, number: int) -> None:
    """Median over seeds with the range shaded; markers of neighbouring lines side by side."""
    over = rows.groupby("step")["value"].agg(["min", "median", "max"])
    ceiling = look.color == style("optimal").color
    ax.fill_between(over.index, over["min"], over["max"], color=look.color, alpha=0.2, linewidth=0)
    ax.plot(
        over.index,
        over["median"],
        color=look.color,
        linestyle=look.line,
        linewidth=3 if ceiling else 1.5,
        marker="" if ceiling else look.marker,
        markersize=4.5,
        markevery=(2 * number % 5, 5),
        label=text,
    )


def _steps(ax: Axes, workload: pd.DataFrame, text: str) -> None:
    """A log axis that holds step 0, and where the training stands."""
    last = workload["step"].max()
    ax.set_xscale("symlog", linthresh=1, linscale=0.5)
    ticks = [0, *(10**k for k in range(len(str(last))) if 10**k <= last)]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    accuracy = workload[workload["metric"] == "accuracy"].groupby("step")["value"].median()
    reached = accuracy[accuracy >= ACCURACY]
    if len(reached):
        step = reached.index[0]
        ax.axvline(step, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        ax.annotate(
            text,
            (step, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-2, 0),
            textcoords="offset points",
            rotation=90,
            horizontalalignment="right",
            verticalalignment="bottom",
            fontsize=7,
            color=GREY,
        )


def _say_exact(row: Iterable[Axes], layers: pd.DataFrame) -> None:
    """Two classes have one gradient direction, so that H of a single layer is a product."""
    for ax, workload in zip(row, layers["workload"], strict=True):
        if workload == "digits-logistic":
            text = "two classes: H is exactly a\nproduct, uuᵀ ⊗ E[p(1−p)xxᵀ]"
            ax.annotate(
                text, (0.03, 0.88), xycoords="axes fraction", va="top", fontsize=7.5, color=GREY
            )


SCRIPT = Script(
    NAME,
    __doc__.splitlines()[0],
    PRESETS,
    collect,
    draw,
    lambda table: (headline(table), explanation(table)),
)

if __name__ == "__main__":
    SCRIPT.main()
