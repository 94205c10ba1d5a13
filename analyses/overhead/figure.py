"""The figure of what an optimizer costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from kronecker_probe.plots.panels import Panels, log_axis, name_axes

from .steps import ADAMW, LIMIT, METHODS, PROBLEMS
from .tables import RARE, USUAL, methods_of, percents, sentences

BARS = {
    "forward_backward": ("forward + backward", "#dddddd", ""),
    "update": ("AdamW's update", "#666666", ""),
    "statistics": ("statistics", "#e69f00", "//"),
    "refresh": ("refresh / F", "#d55e00", "xxx"),
    "application": ("application", "#009e73", "\\\\"),
    "other": ("other", "#f0e442", "..."),
}


def draw(table: pd.DataFrame) -> Figure:
    """A row a model: overhead against the batch; parts by optimizer, block size and F."""
    found, figure = percents(table), Figure()
    panels = Panels.make(3 * len(PROBLEMS), None, figure, width=4.6, height=3.4, columns=3)
    for (model, problem), axes in zip(PROBLEMS.items(), panels.axes.reshape(-1, 3), strict=True):
        one = found[model]
        at = one.xs(problem.reference, level="batch_size")
        sizes = [*at.index.unique("block_size")[1:], 0]
        blocks = {name: {str(b or "–"): (name, b, USUAL) for b in sizes}
                  for name in methods_of(one, knobs=True)}  # fmt: skip
        often = {name: {f"{F:g}": (name, 0, F) for F in at.index.unique("interval")}
                 for name in blocks}  # fmt: skip
        single = {name: {"": (name, 0, USUAL)} for name in (ADAMW, *methods_of(one))}
        trainings = percents(table, "direct")[model].droplevel(["measured", "batch_size"])
        _draw_batches(axes[0], one, model)
        _draw_bars(axes[1], at, single | blocks, trainings)
        _draw_bars(axes[2], at, often, trainings)
        where = f"at batch {problem.reference}"
        name_axes(axes[1], f"by block_size (–: none) {where}, F = {USUAL}", "", "% of AdamW's step")
        name_axes(axes[2], f"by refresh interval F {where}", "", "% of AdamW's step")
    texts = [(a.get_title(loc="left"), a.get_xlabel(), a.get_ylabel()) for a in panels.axes]
    panels.finish(sentences(table)[0], "", "", legend=True)
    for ax, text in zip(panels.axes, texts, strict=True):
        name_axes(ax, *text)
    figure.supxlabel(f"medians, {table['machine'].iloc[0]}", x=0.99, ha="right", fontsize=8)
    return figure


def _draw_batches(ax: Axes, found: Any, model: str) -> None:
    for name in methods_of(found):
        look = METHODS[name].look
        for F, line in ((RARE, "--"), (USUAL, "-"))[not METHODS[name].knobs :]:
            curve = found[name, 0, F, "overhead"]
            ax.plot(curve.index, curve, color=look.color, marker=look.marker, markersize=4,
                    linestyle=line, linewidth=1.2, label=name if F == USUAL else None)  # fmt: skip
    ax.axhline(LIMIT, color="#000000", linestyle=":")
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    ax.set_xticks(curve.index, [f"{size:g}" for size in curve.index])
    ax.xaxis.set_minor_locator(NullLocator())
    unit = f"batch: {PROBLEMS[model].unit}"
    title = f"{model}: F = {USUAL}; dashed: F = {RARE}"
    name_axes(ax, title, unit, f"% over AdamW's step (dotted: {LIMIT:.0f}%)")


def _draw_bars(ax: Axes, at: Any, groups: Mapping[str, Mapping[str, Any]], trainings: Any) -> None:
    """Steps as stacks of parts, with the overhead on top, and the trainings."""
    place, ticks = 0.0, {}
    for group, bars in groups.items():
        middle = place + (len(bars) - 1) / 2
        ax.text(middle, -0.1, group.replace(" ", "\n", 1), transform=ax.get_xaxis_transform(),
                ha="center", va="top", fontsize=8)  # fmt: skip
        for text, key in bars.items():
            ticks[place], shown, foot = text, at[key], 0.0
            for part, (label, color, hatch) in BARS.items():
                if part in shown:
                    ax.bar(place, shown[part], 0.85, foot, color=color, hatch=hatch, label=label,
                           edgecolor="#ffffff", linewidth=0.4)  # fmt: skip
                    foot += shown[part]
            if key in trainings.index:
                whole = 100 + trainings[key]
                ax.plot(place + 0.3, whole, "D", markersize=4, markeredgecolor="#000000",
                        color="#ffffff", linestyle="", label="a whole training")  # fmt: skip
                foot = max(foot, whole)
            ax.annotate(f"{shown['overhead']:+.0f}", (place, foot), (0, 4), fontsize=7,
                        textcoords="offset points", ha="center")  # fmt: skip
            place += 1
        place += 0.6
    ax.axhline(100, color="#000000", linewidth=0.8, linestyle=":")
    ax.set_xticks(list(ticks), list(ticks.values()))
