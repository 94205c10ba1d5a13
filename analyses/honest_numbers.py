"""How far off is the quality that a sample shows, and what does an estimate with error bars give?

The second moment of N gradients has rank N at most, and its distance from any Kronecker product
is mostly noise. So the cosine of the sample matrix to an approximation fitted to it, the plug-in
number that papers print, understates the quality of that approximation until N is large. The
population estimate removes all that a draw has to do with itself, and has a standard error; the
held-out estimate scores factors of one half of the data on the other half.

Here the truth is known. The model is a softmax layer with fixed weights; its inputs are normal,
as many as are wanted, and labels are sampled from the model, so that H is its Gauss-Newton matrix.
The truth is that of 131,072 quasi-random inputs with the exact expectation over labels; other
points (the error of the truth, a row of the table) move it by less than 0.0001.

The table (honest_numbers.csv) has one cosine a row: ``kind`` plugin, held-out or population, for
each N, repetition and approximation, without a value where the estimate abstains; "truth" rows,
and "truth_error" rows, have no N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.progress import track
from scipy.stats import norm, qmc
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.cli.analysis import Script
from kronecker_probe.plots.panels import GREY, Panels
from kronecker_probe.table.read import short

NAME = "honest_numbers"
INPUTS, CLASSES = 12, 10
APPROXIMATIONS = ("optimal", "shampoo-squared", "kfac", "shampoo")
KINDS = ("plugin", "held-out", "population")
# Okabe and Ito's colours, with markers, lines and hatches that differ, too
LOOKS = {
    "plugin": ("#d55e00", "^", "-"),
    "held-out": ("#009e73", "s", (0, (5, 2))),
    "population": ("#0072b2", "o", "-"),
}
NAMES = {"plugin": "plug-in", "held-out": "held-out (N/2 data)", "population": "population"}
# Shares of repetitions: the range that is shaded, and how many must give a number to be drawn.
LOW, HIGH, GIVEN = 0.05, 0.95, 0.9
# The bias that counts as none.
SMALL = 0.01

Row = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """How much is measured.

    Attributes:
        seeds: Repetitions for each N, seeds 0, 1, ... of inputs and labels.
        sizes: N.
        truth: Inputs that the truth is computed from, a power of 2.
    """

    seeds: int
    sizes: tuple[int, ...]
    truth: int


PRESETS = {
    "quick": Preset(20, (8, 32, 128, 512), 2**14),
    "default": Preset(100, tuple(2**k for k in range(3, 12)), 2**17),
}


def model() -> nn.Linear:
    """The fixed softmax layer; its likeliest class has a probability of .56 on average."""
    layer = nn.Linear(INPUTS, CLASSES, bias=False, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CLASSES, INPUTS, generator=generator, dtype=torch.float64)
    layer.weight.data = 1.5 * weight * deviations()
    return layer


def deviations() -> Tensor:
    """Standard deviations of the inputs, which are independent."""
    return torch.logspace(0, -math.log10(5), INPUTS, dtype=torch.float64)


def captured(inputs: Tensor, draws: str, seed: int = 0) -> kp.Capture:
    """The gradients of the layer at these inputs; neither kind of draws reads the labels."""
    unused = torch.zeros(len(inputs), dtype=torch.long)
    return kp.capture(model(), nn.CrossEntropyLoss(), (inputs, unused), draws, seed=seed)


def sample(count: int, seed: int) -> kp.Capture:
    """``count`` normal inputs, one label sampled for each."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, INPUTS, generator=generator, dtype=torch.float64)
    return captured(normal * deviations(), "fisher", seed)


def truth(count: int, seed: int = 0) -> dict[str, float]:
    """Cosine of each approximation in the limit, from scrambled Sobol' points."""
    points = qmc.Sobol(INPUTS, seed=seed).random(count)
    inputs = torch.from_numpy(norm.ppf(points)) * deviations()
    H = kp.SecondMoment(captured(inputs, "ggn")["weight"])
    return {name: kp.cosine_similarity(H, kp.approximate(H, name)) for name in APPROXIMATIONS}


def collect(preset: Preset) -> pd.DataFrame:
    """The table: every N and repetition, one cosine a row."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    limit, other = truth(preset.truth), truth(preset.truth, seed=1)
    for name, value in limit.items():
        rows += [
            {"approximation": name, "kind": "truth", "cosine": value},
            {"approximation": name, "kind": "truth_error", "cosine": abs(value - other[name])},
        ]
    for seed in track(range(preset.seeds), description="repetitions"):
        for count in preset.sizes:
            rows += measured(count, seed)
    return pd.DataFrame(rows).astype({"n": "Int64", "repetition": "Int64"})


def measured(count: int, seed: int) -> Iterator[Row]:
    """All estimates of one sample."""
    scores = kp.compare(
        sample(count, seed),
        APPROXIMATIONS,
        metrics="cosine",
        estimates=KINDS,
        singular_values=0,
    )
    for row in scores.table[scores.table["metric"] == "cosine"].to_dict("records"):
        cell = {key: row[key] for key in ("approximation", "kind")}
        yield {"n": count, "repetition": seed, **cell, "cosine": row["value"]}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """By approximation, kind and N: mean, range, bias, and the share that gives a number."""
    values = table[table["kind"].isin(KINDS)].astype({"n": int})
    groups = values.groupby(["approximation", "kind", "n"])["cosine"]
    found = pd.DataFrame(
        {
            "mean": groups.mean(),
            "low": groups.quantile(LOW),
            "high": groups.quantile(HIGH),
            "given": groups.count() / groups.size(),
        }
    )
    known = found.index.get_level_values("approximation").map(truths(table).__getitem__)
    return found.assign(bias=found["mean"] - known)


def truths(table: pd.DataFrame) -> dict[str, float]:
    """The true cosine of each approximation."""
    rows = table[table["kind"] == "truth"]
    return dict(zip(rows["approximation"], rows["cosine"], strict=True))


def plugin_needs(table: pd.DataFrame) -> str:
    """The data from which on the plug-in cosine is right to .01, in words."""
    plugin = summary(table).xs("plugin", level="kind")["bias"].abs().groupby("n").max()
    wrong = plugin.index[plugin > SMALL]
    if not len(wrong):
        return f"the plug-in cosine is right to {SMALL} from {plugin.index.min()} data on"
    after = plugin.index[plugin.index > wrong.max()]
    if not len(after):
        return f"the plug-in cosine is off by more than {SMALL} even with {wrong.max()} data"
    return f"the plug-in cosine needs {after.min()} data to be right to {SMALL}"


def headline(table: pd.DataFrame) -> str:
    """What each kind is off by, at the least N where the population estimate is given."""
    found = summary(table)
    population = found.xs("population", level="kind")
    given = population["given"].groupby("n").min()
    enough = given.index[given >= GIVEN]
    if not len(enough):
        return "No N is large enough for a population estimate; plug-in numbers alone are left"
    least = enough.min()
    at = found.xs(least, level="n")["bias"].unstack("kind")
    worst = population[population.index.get_level_values("n") >= least]["bias"].abs().max()
    return (
        f"With {least} data the plug-in cosine is {-at['plugin'].max():.2f} to "
        f"{-at['plugin'].min():.2f} too low; the population estimate is right to "
        f"{math.ceil(1e3 * worst - 1e-6) / 1e3:.3f} on average, from there on; "
        f"{plugin_needs(table)}"
    )


def draw(table: pd.DataFrame) -> Figure:
    """A panel an approximation: mean and 5 to 95% range of each kind over N."""
    known, found = truths(table), summary(table).reset_index()
    figure = Figure()
    panels = Panels.make(len(APPROXIMATIONS), None, figure, width=4.4, height=3.0, columns=2)
    for ax, name in zip(panels.axes, APPROXIMATIONS, strict=True):
        ax.set_title(short(name), fontsize=10, loc="left")
        ax.axhline(known[name], color="black", linewidth=1.8, label="truth")
        for kind in KINDS:
            of_both = (found["approximation"] == name) & (found["kind"] == kind)
            _curve(ax, found[of_both].set_index("n"), kind)
        sizes = sorted(table["n"].dropna().astype(int).unique())
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_ylim(0.35, 1.03)
    note = "mean and 5–95% of the repetitions;\nno estimate where N_eff is under 30"
    first = panels.axes[0]
    first.text(0.97, 0.06, note, fontsize=8, color=GREY, ha="right", transform=first.transAxes)
    panels.finish(headline(table), "data N", "cosine to H", legend=True)
    return figure


def _curve(ax: Axes, rows: pd.DataFrame, kind: str) -> None:
    color, marker, line = LOOKS[kind]
    shown = rows[rows["given"] >= GIVEN]
    ax.fill_between(shown.index, shown["low"], shown["high"], color=color, alpha=0.18, linewidth=0)
    ax.plot(shown.index, shown["mean"], color=color, marker=marker, linestyle=line, markersize=5,
            markeredgecolor="white", label=NAMES[kind])  # fmt: skip


def sentences(table: pd.DataFrame) -> Iterator[str]:
    """The conclusion, then the bias of every kind at every N."""
    yield headline(table)
    error = table.loc[table["kind"] == "truth_error", "cosine"].max()
    yield f"The truth is known to {error:.1g}."
    bias = summary(table)["bias"].unstack("n")
    yield bias.to_string(float_format=lambda value: f"{value:+.3f}")


SCRIPT = Script(
    NAME, __doc__.splitlines()[0], PRESETS, collect, draw, lambda table: tuple(sentences(table))
)

if __name__ == "__main__":
    SCRIPT.main()
