"""The figure of steps and seconds to a loss, and of cosines beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.markers import CARETRIGHT
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from kronecker_probe.plots.panels import GREY, SHADE, Panels, name_axes

from .methods import METHODS, Row
from .tables import REFERENCE, correlation, cosines, sentences, summary


def draw(table: pd.DataFrame) -> Figure:
    """A row a workload: steps and seconds to the target by method, and steps against cosines."""
    figure, over = Figure(), summary(table)
    names = list(over.index.unique("workload"))
    panels = Panels.make(3 * len(names), None, figure, width=4.6, height=4.4, columns=3)
    panels.finish(sentences(table)[0], "", "", legend=False)
    for row, name in enumerate(names):
        one, (first, second, third) = over.loc[name], panels.axes[3 * row : 3 * row + 3]
        target = table[(table["workload"] == name) & (table["measured"] == "target")]
        runs = table[(table["workload"] == name) & table["measured"].isin(("steps", "seconds"))]
        wide = runs.set_index(["measured", "method", "seed"])["value"]
        for ax, measured in ((first, "steps"), (second, "seconds")):
            _draw_runs(ax, wide[measured].unstack(), one, measured)
        second.tick_params(labelleft=False)  # the same methods
        _draw_cosines(third, cosines(table).loc[name], one)
        goal = f"{name}: to the loss {target['value'].iloc[0]:.3g}"
        name_axes(first, goal, "steps (bar: median of all seeds)", "")
        name_axes(second, f"{name}: the same in CPU seconds", "seconds", "")
        r, p = correlation(one, "steps")
        title = f"{name}: rank correlation {r:+.2f} (p = {p:.2g})"
        cosine, steps = "cosine of P (bar: range of the seeds)", "steps; grey: not reached, by loss"
        name_axes(third, title, cosine, steps)
    return figure


def _place(
    values: NDArray[np.float64], low: float, edge: float, width: float
) -> tuple[NDArray[np.float64], float, float]:
    """Finite values as they are, infinite ones spread over a band beyond ``edge``.

    Args:
        values: In any order.
        low: The lower end of the axis.
        edge: The largest finite value on it.
        width: Of the band, in edge - low.

    Returns:
        The places, and the ends of the band.
    """
    start = edge + 0.04 * (edge - low)
    end = start + width * (edge - low)
    lost = np.isinf(values)
    at = start + (end - start) * (np.arange(lost.sum()) + 0.5) / max(1, lost.sum())
    values = values.copy()
    values[lost] = at
    return values, start, end


def _draw_runs(ax: Axes, runs: pd.DataFrame, over: Any, measured: str) -> None:
    """Seeds as dots and the median as a bar, a line a method; in the band what is not reached."""
    edge = float(np.ma.masked_invalid(runs.to_numpy()).max())
    for row, (name, one) in enumerate(over.iterrows()):
        method = str(name)
        how, values = METHODS[method], np.sort(runs.loc[method].to_numpy())
        at, start, end = _place(values, 0.0, edge, 0.26)
        lost = np.isinf(values)
        look: Row = {"color": how.color, "markersize": 5, "linestyle": "", "marker": how.marker}
        ax.plot(at[~lost], np.full((~lost).sum(), row), alpha=0.8, **look)
        ax.plot(at[lost], np.full(lost.sum(), row), **look | {"marker": CARETRIGHT})
        if math.isfinite(one[measured]):
            ax.plot(one[measured], row, "|", color=how.color, markersize=16, mew=2.5)
        else:
            text = f" loss {one['final_loss']:.3g}"
            ax.text(end, row, text, va="center", fontsize=7.5, color=GREY)
    ax.axvspan(start, end, color=SHADE, zorder=0)
    ax.text((start + end) / 2, -0.75, "not reached", ha="center", va="center", fontsize=7.5,
            color=GREY)  # fmt: skip
    if math.isfinite(own := over.loc[REFERENCE, measured]):
        ax.axvline(own, color=GREY, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    ax.set_xlim(0.0, 1.18 * end)
    _ticks_within(ax.xaxis, 0.0, edge)
    ax.set_ylim(len(over) - 0.4, -1.1)
    ax.set_yticks(range(len(over)), over.index)
    for tick, name in zip(ax.get_yticklabels(), over.index, strict=True):
        tick.set_color(METHODS[name].color)


def _ticks_within(axis: Axis, low: float, high: float) -> None:
    """No ticks in the band."""
    axis.set_ticks([tick for tick in axis.get_majorticklocs() if low <= tick <= high])


def _draw_cosines(ax: Axes, cosine: pd.Series, over: pd.DataFrame) -> None:
    """A point a method, named."""
    known = over.dropna(subset="cosine")
    steps = known["steps"].to_numpy()
    edge, low = steps[np.isfinite(steps)].max(), 0.8 * steps.min()
    at_steps, start, end = _place(steps, low, edge, 0.1 * max(3, np.isinf(steps).sum()))
    ax.set_ylim(low, end)
    _ticks_within(ax.yaxis, low, edge)
    ax.axhspan(start, end, color=SHADE, zorder=0)
    points, bars = [], []
    for (name, one), at in zip(known.iterrows(), at_steps, strict=True):
        method = str(name)
        how, each = METHODS[method], cosine.loc[method].groupby("seed").median()
        ax.plot([each.min(), each.max()], [at, at], color=how.color, linewidth=1, alpha=0.6)
        ax.plot(one["cosine"], at, color=how.color, marker=how.marker, markersize=6)
        points.append((float(one["cosine"]), float(at), method))
        bars += [(each.min(), at), (each.max(), at)]
    ax.margins(x=0.14)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    _label(ax, points, bars)


def _label(
    ax: Axes, points: list[tuple[float, float, str]], bars: list[tuple[float, float]]
) -> None:
    """Names beside their points, at the first of some places that is free."""
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]  # settles where things lie
    at = ax.transData.transform([point[:2] for point in points])
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    ends = ax.transData.transform(bars)
    taken += [(*one - 3, *other + 3) for one, other in zip(ends[::2], ends[1::2], strict=True)]
    room, scale = ax.get_window_extent(), ax.figure.dpi / 72
    for (x, y, name), (px, py) in zip(points, at, strict=True):
        wide, tall = 4.9 * len(name) * scale, 9 * scale
        found = [(px + dx, py + dy, dx, dy) for dx, dy in _offsets(wide, tall)]
        boxes = [(left, bottom, left + wide, bottom + tall) for left, bottom, _, _ in found]
        free = [
            not any(b[0] < t[2] and t[0] < b[2] and b[1] < t[3] and t[1] < b[3] for t in taken)
            and room.x0 <= b[0] and b[2] <= room.x1 and room.y0 <= b[1] and b[3] <= room.y1
            for b in boxes
        ]  # fmt: skip
        best = free.index(True) if any(free) else 0
        taken.append(boxes[best])
        offset = (found[best][2] / scale, found[best][3] / scale)
        arrow = {"arrowstyle": "-", "linewidth": 0.5, "color": METHODS[name].color}
        ax.annotate(name, (x, y), offset, textcoords="offset points", fontsize=7.5,
                    color=METHODS[name].color, arrowprops=arrow)  # fmt: skip


def _offsets(wide: float, tall: float) -> Iterator[tuple[float, float]]:
    """Where a label's lower left corner may lie from its point, the nearest first."""
    for ring in range(8):
        shift = ring * 0.6 * tall
        for dy in (shift, -shift) if ring else (0.0,):
            yield 9 + shift / 2, dy - tall / 2
            yield -9 - wide - shift / 2, dy - tall / 2
        yield -wide / 2, 8 + shift
        yield -wide / 2, -8 - tall - shift
