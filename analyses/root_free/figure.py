"""The figure of ``root_free``: training above, then batch sizes and coordinates, then bfloat16."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from kronecker_probe.linalg.inverse_roots import TOLERANCE
from kronecker_probe.plots.panels import GREY, SHADE, Panels, Style, log_axis, name_axes

from .batch import SCALINGS
from .coordinates import COMPARED
from .methods import CNN, GPT, METHODS
from .precision import BEST, FULL, HALF, INVERSE_FREE, INVERSES, ROOTS
from .sentences import BREAKS, KEYS, sentences
from .tables import best_rates, by_precision, changes, curves, distances, second_moments

CHANCE = {CNN: math.log(10), GPT: math.log(256)}  # losses of guessing
WORST = 10.0  # what the figure shows of larger losses
SCALING_LOOKS = {"B g²": Style("#cc79a7", "P", "-"), "g²": Style("#000000", "X", (0, (1, 1)))}
LOOKS = {
    FULL: Style("#000000", "o", "-"),
    HALF: Style("#e69f00", "X", (0, (4, 2))),
    BEST: Style("#56b4e9", "P", (0, (1, 1))),
}
LEAST, MOST = 1e-8, 1e3  # residuals that are shown as they are


def draw(table: pd.DataFrame) -> Figure:
    """A row of panels for each workload, one for batches and coordinates, one for bfloat16."""
    figure = Figure()
    panels = Panels.make(12, None, figure, width=3.9, height=2.9, columns=3)
    axes = panels.axes
    for row, workload in enumerate((CNN, GPT)):
        training = table[(table["part"] == "training") & (table["workload"] == workload)]
        _draw_search(axes[3 * row], training, workload)
        _draw_curves(axes[3 * row + 1], curves(table).loc[workload], workload)
        _draw_final(axes[3 * row + 2], training, best_rates(table, workload), workload)
    moments: Any = second_moments(table)
    for ax, labels in zip(axes[6:8], ("sampled", "true"), strict=True):
        _draw_moments(ax, moments.loc[labels], labels)
    _draw_distances(axes[8], distances(table))
    _draw_changes(axes[9], changes(table))
    _draw_damped(axes[10], by_precision(table, "loss").xs(ROOTS, level="method"))
    _draw_residuals(axes[11], 10.0 ** by_precision(table, "log10_residual"))
    texts = [(ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel()) for ax in axes]
    panels.finish(sentences(table)[0], "", "", legend=True)
    for ax, text in zip(axes, texts, strict=True):
        name_axes(ax, *text)
    return figure


def _line(ax: Axes, x: Any, y: Any, method: str, **more: Any) -> None:
    look = METHODS[method].look
    face = "white" if METHODS[method].root else look.color
    options = {"linestyle": look.line, "markersize": 5, "label": method} | more
    ax.plot(x, y, color=look.color, marker=look.marker, markerfacecolor=face, **options)


def _draw_search(ax: Axes, training: pd.DataFrame, workload: str) -> None:
    rows = training[training["measured"] == "trial"]
    for method in METHODS:
        one = rows[rows["method"] == method].sort_values("lr")
        _line(ax, one["lr"], one["value"].clip(upper=WORST), method)
    ax.axhline(CHANCE[workload], color=GREY, linewidth=1, linestyle=(0, (1, 2)))
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    title = f"{workload}: the search, one seed, the same rates"
    name_axes(ax, title, "learning rate", "final training loss")


def _draw_curves(ax: Axes, over: pd.DataFrame, workload: str) -> None:
    for method, how in METHODS.items():
        one = over.loc[method].clip(upper=WORST)
        ax.fill_between(one.index, one["min"], one["max"], color=how.look.color, alpha=0.12,
                        linewidth=0)  # fmt: skip
        _line(ax, one.index, one["median"], method, markevery=4)
    log_axis(ax.yaxis)
    name_axes(ax, f"{workload}: median and range of the seeds", "step", "training loss")


def _draw_final(ax: Axes, training: pd.DataFrame, rates: dict[str, float], workload: str) -> None:
    rows = training[training["measured"] == "loss"]
    rows = rows[rows["step"] == rows["step"].max()]
    names = list(METHODS)[::-1]
    for place, method in enumerate(names):
        values = rows.loc[rows["method"] == method, "value"].clip(upper=WORST)
        _line(ax, values, [place] * len(values), method, linestyle="", label=None)
        ax.annotate(f"lr {rates[method]:.2g}", (values.median(), place), (0, 7),
                    textcoords="offset points", ha="center", fontsize=8,
                    color=GREY)  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.margins(x=0.15, y=0.15)
    log_axis(ax.xaxis)
    low, high = ax.get_xlim()
    if high < 10 * low:  # where 1, 2 and 5 are too few and all digits too many
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.xaxis.set_minor_locator(NullLocator())
    name_axes(ax, f"{workload}: at the last step, seed by seed", "training loss", "")


def _draw_moments(ax: Axes, over: pd.DataFrame, labels: str) -> None:
    middle, ends = over.groupby(KEYS), SCALING_LOOKS
    for name in SCALINGS:
        one, look = middle.median().loc[name], ends[name]
        low, high = (getattr(middle["held"], end)().loc[name] for end in ("min", "max"))
        ax.plot(one.index, one["theory"], color=look.color, linestyle=look.line,
                label=f"s of {name}, theory")  # fmt: skip
        ax.errorbar(one.index, one["held"], [one["held"] - low, high - one["held"]], capsize=2,
                    color=look.color, marker=look.marker, markersize=5, linestyle="",
                    label=f"s of {name}, held")  # fmt: skip
    ax.set_xscale("log", base=4)
    log_axis(ax.yaxis)
    ax.xaxis.set_minor_locator(NullLocator())
    sizes = list(over.index.unique("batch_size"))
    ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
    title = f"{labels} labels: " + (
        "B undoes the batch" if labels == "sampled" else "the mean enters"
    )
    name_axes(ax, title, "batch size B", "mean of s over that at B = 1")


def _draw_distances(ax: Axes, over: pd.DataFrame) -> None:
    for method in COMPARED:
        one, look = over.loc[method], METHODS[method].look
        ax.fill_between(one.index, one["min"], one["max"], color=look.color, alpha=0.12,
                        linewidth=0)  # fmt: skip
        _line(ax, one.index, one["median"], method, markevery=4)
    log_axis(ax.yaxis)
    name_axes(ax, "weights rescaled at random", "step", "relative distance of the runs")


def _dots(ax: Axes, x: Any, y: Any, how: str, **more: Any) -> None:
    look = LOOKS[how]
    ax.plot(x, y, color=look.color, marker=look.marker, markersize=6, **more)


def _draw_changes(ax: Axes, over: pd.DataFrame) -> None:
    """Seed by seed; broken runs stand at the right edge."""
    cases = list(over.reset_index().groupby(["method", "damping"], dropna=False).groups)
    order = (INVERSE_FREE, INVERSES, ROOTS)
    cases = sorted(cases, key=lambda case: (order.index(case[0]), -case[1]))[::-1]
    flat = over.reset_index()
    finite = flat[[HALF, BEST]].stack()
    edge = max(2 * BREAKS, float(finite[finite < math.inf].max())) * 1.25
    names = []
    for place, (method, damping) in enumerate(cases):
        one = flat[flat["method"] == method]
        if method == INVERSE_FREE:
            names.append("InverseFree,\nwhole state")
        else:
            one = one[one["damping"] == damping]
            names.append(f"{method.removesuffix('Shampoo') or method}, {damping:.0e}")
        for how, shift in ((HALF, 0.13), (BEST, -0.13)):
            values = one[how].dropna().clip(upper=edge)
            _dots(ax, values, [place + shift] * len(values), how, linestyle="")
    ax.axvspan(-BREAKS, BREAKS, color=SHADE, zorder=0)
    ax.axvline(edge, color=GREY, linewidth=1, linestyle=(0, (1, 2)))
    ax.text(edge, len(cases) - 0.45, "broke", ha="center", fontsize=8, color=GREY)
    ax.set_yticks(range(len(cases)), names)
    ax.set_ylim(-0.6, len(cases))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(lambda change, _: f"{round(100 * change, 3) + 0.0:g}%")
    name_axes(ax, "bfloat16 in each seed, 1% shaded", "change of the final loss", "")


def _draw_damped(ax: Axes, over: pd.DataFrame) -> None:
    middle = over.groupby("damping").median()
    for how, look in LOOKS.items():
        one = middle[how][middle[how] < math.inf]
        _dots(ax, one.index, one, how, linestyle=look.line, label=how)
    log_axis(ax.xaxis)
    ax.invert_xaxis()
    name_axes(ax, "Shampoo: median, unless runs break", "relative damping", "training loss")


def _draw_residuals(ax: Axes, over: pd.DataFrame) -> None:
    middle = over.groupby(["method", "damping"]).median().clip(LEAST, MOST)
    for how, look in LOOKS.items():
        one = middle.loc[ROOTS][how]
        _dots(ax, one.index, one, how, linestyle=look.line)
        free = middle.loc[INVERSES][how]
        _dots(ax, free.index, free, how, linestyle="", markerfacecolor="white")
    ax.axhline(TOLERANCE, color=GREY, linewidth=1, linestyle=(0, (1, 2)))
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    ax.invert_xaxis()
    title = "median residual (open: RootFreeShampoo)"
    name_axes(ax, title, "relative damping", "residual of the roots")
