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

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from rich.progress import track
from torch import Tensor

import kronecker_probe as kp
from kronecker_probe.panels import Panels, style
from kronecker_probe.tables import label
from kronecker_probe.workloads import load_workload

NAME = "shampoo_square"
APPROXIMATIONS = ("optimal", "shampoo-squared", "kfac", "shampoo")
RATIOS = {
    "sigma1_ratio": "σ₁/‖H‖, the ratio itself",
    "identity_start_left": "after the identity start: cos(L, U₁)",
    "identity_start_right": "after the identity start: cos(R, V₁)",
}
TITLES = {"digits-logistic": "logistic regression, digits 3 and 8", "digits-mlp": "MLP, ten digits"}
NEAR = 0.1  # "near the optimum": a tenth of Shampoo's distance, or less, at every point
KEYS = ["workload", "seed", "n_data", "parameter", "step"]

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
    model, loss_fn = workload.model, workload.loss_fn
    optimizer = kp.optim.Shampoo(model.named_parameters(), lr=workload.lr)
    total = workload.steps if preset.steps is None else preset.steps
    probed = log_steps(total, preset.probes)
    sizes = [size or len(workload.train[1]) for size in preset.probe_sizes]
    for step in range(total + 1):
        if step in probed:
            for size in sizes:
                data = workload.probe(size, seed)
                shared = {"workload": name, "seed": seed, "n_data": len(data[1]), "step": step}
                samples = kp.capture(model, loss_fn, data, draws="ggn")
                yield from (shared | row for row in measure(samples))
        inputs, targets = workload.batch(step, workload.batch_size, seed)
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()


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
    return {
        "sigma1_ratio": float(H.kronecker_spectrum(1)[0]) / H.norm(),
        "identity_start_left": _overlap(square.left, best.left),
        "identity_start_right": _overlap(square.right, best.right),
    }


def _overlap(A: Tensor, B: Tensor) -> float:
    return float((A * B).sum() / (A.norm() * B.norm()))


def widest(table: pd.DataFrame) -> pd.DataFrame:
    """The rows measured on each workload's largest probe set."""
    largest = table.groupby("workload")["n_data"].transform("max")
    return table[table["n_data"] == largest]


def cosines(table: pd.DataFrame) -> pd.DataFrame:
    """A row per (workload, seed, n_data, parameter, step), a column per approximation."""
    rows = table[table["metric"] == "cosine"]
    return rows.set_index([*KEYS, "approximation"])["value"].unstack("approximation")


def headline(table: pd.DataFrame) -> str:
    """The finding: the worst gap of Shampoo^2 and the least of Shampoo, median (range) of seeds."""
    wide = cosines(widest(table))
    square = wide["optimal"] - wide["shampoo-squared"]
    own = wide["optimal"] - wide["shampoo"]
    if (square <= NEAR * own).all():
        verdict = "Shampoo² stays near the optimal Kronecker product all along training, Shampoo's"
        verdict += " own approximation does not"
    elif (square < own).all():
        verdict = "Shampoo² is closer to the optimal Kronecker product than Shampoo all along"
        verdict += " training, but not near it everywhere"
    else:
        verdict = "Shampoo² is not always closer to the optimal Kronecker product than Shampoo"
    seeds = square.index.get_level_values("seed").nunique()
    return (
        f"{verdict}: its cosine to H is at most {_spread(square.groupby('seed').max())} below the "
        f"optimum's, Shampoo's at least {_spread(own.groupby('seed').min())} below "
        f"(median and range of {seeds} seeds)"
    )


def _spread(values: pd.Series[float]) -> str:
    """Median and range, "0.010 [0.008, 0.012]"."""
    return f"{values.median():.3f} [{values.min():.3f}, {values.max():.3f}]"


def draw(table: pd.DataFrame) -> Figure:
    """Above the cosines, below the ratios; a column per layer, median and range of the seeds."""
    shown = widest(table)
    layers = shown.dropna(subset="parameter").drop_duplicates(["workload", "parameter"])
    figure = Figure()
    panels = Panels.make(2 * len(layers), None, figure, width=3.3, height=2.7, columns=len(layers))
    above, below = panels.axes[: len(layers)], panels.axes[len(layers) :]
    for top, bottom, layer in zip(above, below, layers.itertuples(), strict=True):
        one = shown[(shown["workload"] == layer.workload) & (shown["parameter"] == layer.parameter)]
        size = f"{layer.parameter} ({layer.m:.0f} × {layer.n:.0f}), N = {layer.n_data}"
        top.set_title(f"{TITLES[layer.workload]}\n{size}", fontsize=9, loc="left")
        for name in APPROXIMATIONS:
            look = style(name)
            _line(top, one[one["approximation"] == name], label(name), look.color, look.line)
        for metric, text in RATIOS.items():
            _line(bottom, one[one["metric"] == metric], text, *_RATIO_LOOKS[metric])
    panels.finish(headline(table), "optimizer step", "cosine similarity to H", legend=True)
    return figure


_RATIO_LOOKS = {
    "sigma1_ratio": ("#000000", "-"),
    "identity_start_left": ("#0072b2", "-"),
    "identity_start_right": ("#0072b2", (0, (5, 2))),
}


def _line(ax: Axes, rows: pd.DataFrame, text: str, color: str, line: Any) -> None:
    """Median over seeds with the range shaded."""
    over = rows.groupby("step")["value"].agg(["min", "median", "max"])
    ax.fill_between(over.index, over["min"], over["max"], color=color, alpha=0.2, linewidth=0)
    ax.plot(over.index, over["median"], color=color, linestyle=line, linewidth=1.8, label=text)
    ax.set_xscale("symlog", linthresh=1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="default")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    chosen = parser.parse_args(arguments)
    table = collect(PRESETS[chosen.preset])
    chosen.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(chosen.out / f"{NAME}.csv", index=False, float_format="%.6f")
    figure = draw(table)
    figure.savefig(chosen.out / f"{NAME}.png", dpi=150)
    figure.savefig(chosen.out / f"{NAME}.svg")


if __name__ == "__main__":
    main()
