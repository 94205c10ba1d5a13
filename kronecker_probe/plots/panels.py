"""The grid, the palette and the decoration that all figures share."""

from __future__ import annotations

import textwrap
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.table.metric_info import metric_info
from kronecker_probe.table.read import short

GREY = "#666666"
SHADE = "#ececec"
TICKS = [1, 2, 5, 10]  # steps between ticks, times a power of 10
_DECADE = 10.0
# last gap between probed steps over the first, above which a linear axis hides the early ones
_UNEVEN = 10
_MARKER_ROOM = 0.03  # the share of the axis that a marker takes
_FEW = 100.0  # the range of an axis with few powers of ten
_CEILING = 1.02  # of cosines, with room for the marker of a 1


@dataclass(frozen=True)
class Style:
    """Colour, marker and line of one approximation, the same in every figure."""

    color: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]


# colours of Okabe & Ito (2008), which colour-blind readers tell apart; markers and lines differ too
STYLES = {
    "optimal": Style("#000000", "_", "-"),
    "shampoo-squared": Style("#0072b2", "o", "-"),
    "kfac": Style("#009e73", "s", (0, (5, 2))),
    "shampoo": Style("#d55e00", "^", (0, (3, 1, 1, 1))),
    "eigen-corrected": Style("#cc79a7", "D", (0, (1, 1))),
    "diagonal": Style("#e69f00", "X", (0, (2, 2))),
    "in-use": Style("#56b4e9", "*", (0, (6, 1, 1, 1, 1, 1))),
    "shampoo-squared-sequential": Style("#0072b2", "v", (0, (4, 1))),
    "kfac-reduce": Style("#009e73", "h", (0, (1, 2))),
    "tkfac": Style("#009e73", "p", (0, (8, 2))),
    "ekfac": Style("#cc79a7", "d", (0, (5, 1, 1, 1))),
    "divergence:q=0": Style("#7f3c8d", "P", "-"),
    "divergence:q=0.5": Style("#7f3c8d", "X", (0, (3, 2))),
    "left-only": Style("#a07800", "<", (0, (2, 1))),
    "right-only": Style("#a07800", ">", (0, (6, 2))),
    "identity": Style(GREY, "1", (0, (1, 3))),
}
# for the others: one with options, and operators of the user's own
_MARKERS = "P8Hd<>^v"


def style(approximation: str) -> Style:
    """The style of an approximation, always the same for a name."""
    if approximation in STYLES:
        return STYLES[approximation]
    base = STYLES.get(approximation.partition(":")[0], Style(GREY, "P", "-"))
    number = zlib.crc32(approximation.encode())
    line = (0, (1 + number % 5, 1 + number // 5 % 3))
    return Style(base.color, _MARKERS[number % len(_MARKERS)], line)


@dataclass(frozen=True)
class Panels:
    """The Axes of one figure, and whether the figure around them is ours to decorate."""

    axes: NDArray[Any]
    columns: int
    figure: Figure | None

    @classmethod
    def make(
        cls,
        count: int,
        axes: Axes | Iterable[Axes] | None,
        figure: Figure | None,
        *,
        width: float,
        height: float,
        columns: int = 4,
    ) -> Panels:
        """``count`` Axes: those given, or new ones in a grid of panels of so many inches."""
        if axes is not None:
            given = [axes] if isinstance(axes, Axes) else list(np.ravel(np.asarray(axes)))
            if len(given) != count:
                raise InvalidInputError(
                    f"axes= holds {len(given)} Axes, but there are {count} panels."
                )
            return cls(_array(given), 1, None)
        columns = min(columns, count if count <= 3 else -(-count // 2) if count <= 6 else columns)
        rows = -(-count // columns)
        size = (max(width * columns, 5.0), height * rows + 0.6)
        if figure is None:
            from matplotlib import pyplot  # picks a backend, so only where a user looks on

            figure = pyplot.figure(figsize=size)
        figure.set_size_inches(*size)
        figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
        grid = figure.add_gridspec(rows, columns)
        made = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(count)]
        return cls(_array(made), columns, figure)

    def finish(self, title: str, x: str, y: str, *, legend: bool) -> None:
        """Title, axis labels where they are not repeated, and a legend."""
        for number, ax in enumerate(self.axes):
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(labelsize=8)
            ax.grid(color="#dddddd", linewidth=0.6)
            ax.set_axisbelow(True)
            if self.figure is None or number % self.columns == 0:
                ax.set_ylabel(y, fontsize=9)
            if self.figure is None or number + self.columns >= len(self.axes):
                ax.set_xlabel(x, fontsize=9)
        if self.figure is not None:
            across = int(self.figure.get_size_inches()[0] * 10)
            self.figure.suptitle(
                textwrap.fill(title, across, break_on_hyphens=False),
                x=0.01,
                ha="left",
                fontsize=11,
                fontweight="bold",
                parse_math=False,  # a "$" in a name is a dollar
            )
        if legend:
            handles = dict(
                pair
                for ax in self.axes
                for pair in zip(*reversed(ax.get_legend_handles_labels()), strict=True)
            )
            place: Callable[..., Any] = self.axes[0].legend
            more: dict[str, Any] = {}
            if self.figure is not None:
                place, more = self.figure.legend, {"loc": "outside lower center", "ncols": 7}
            drawn = place(list(handles.values()), list(handles), fontsize=9, frameon=False, **more)
            for text in drawn.get_texts():
                text.set_parse_math(False)


def _array(axes: Sequence[Axes]) -> NDArray[Any]:
    array = np.empty(len(axes), dtype=object)
    array[:] = axes
    return array


def apart(positions: list[float], gap: float) -> list[float]:
    """Ascending positions moved as little as needed, in least squares, to lie ``gap`` apart."""
    if not positions:
        return []
    steps = gap * np.arange(len(positions))
    moved: list[float] = (isotonic_regression(positions - steps).x + steps).tolist()
    return moved


@dataclass(frozen=True)
class View:
    """Common limits of all panels, and whether the scale is logarithmic."""

    low: float
    high: float
    log: bool


def limits(values: NDArray[np.float64], metric: str) -> View:
    """Limits a little beyond the data; errors over a decade or more get a log scale."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    info = metric_info(metric)
    if info.drawing == "log" and low > 0 and high / low > _DECADE:
        return View(low / 1.15, high * 1.15, True)
    pad = 0.06 * (high - low) or 0.05
    top = high + pad
    if info.better == "higher" and info.limits[1] == 1 and high <= _CEILING:
        top = min(top, _CEILING)
    return View(low - pad, top, False)


def in_view(
    shown: pd.DataFrame, metric: str, ends: Sequence[pd.DataFrame] = ()
) -> NDArray[np.float64]:
    """The values that set the limits: no diagonal where its cosine would take half the axis.

    With the ends of their error bars, as far as these do not more than triple the span.
    """
    columns = list(shown.columns)
    others = shown.drop(columns="diagonal", errors="ignore").to_numpy()
    values = shown.to_numpy()
    info = metric_info(metric)
    if info.better == "higher" and np.isfinite(others).any():
        low, high = np.nanmin(values), np.nanmax(values)
        if np.nanmin(others) - low > 0.5 * (high - low):
            values = others
            columns.remove("diagonal")
    found = values[np.isfinite(values)]
    if not len(found):
        return values
    low, high = float(found.min()), float(found.max())
    span = (high - low) or 0.1
    # an error's bar may reach 0, which no log scale shows
    least = low - span if info.drawing == "linear" else max(low - span, low / 2)
    kept = [column for column in columns if all(column in end for end in ends)]
    bars = [np.clip(end[kept].to_numpy(), least, high + span).ravel() for end in ends]
    return np.concatenate([values.ravel(), *bars])


def set_step_axis(ax: Axes, steps: NDArray[np.int64]) -> None:
    """A linear axis, or a logarithmic one with room for step 0 where early steps are denser."""
    gaps = np.diff(steps)
    if len(gaps) < 4 or gaps[-1] < _UNEVEN * gaps[0]:
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=TICKS))
        return
    first = float(steps[steps > 0][0])
    ax.set_xscale("symlog", linthresh=first, linscale=0.4)
    decades = 10.0 ** np.arange(np.ceil(np.log10(first)), np.floor(np.log10(steps[-1])) + 1)
    ax.xaxis.set_major_locator(FixedLocator([0.0, *decades]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())


def marked_steps(ax: Axes, steps: NDArray[np.int64], number: int, lines: int) -> list[int]:
    """Which steps have a marker: about seven, staggered by line, and none on top of another."""
    every = max(1, len(steps) // 7)
    chosen = list(range(number * every // lines, len(steps), every))
    at = ax.xaxis.get_transform().transform(steps.astype(float))
    apart = _MARKER_ROOM * float(at[-1] - at[0])
    kept: list[int] = []
    for place in reversed(chosen):  # the last one stays: a run's end is what is read first
        if not kept or at[kept[-1]] - at[place] >= apart:
            kept.append(place)
    return kept[::-1]


def label_ends(ax: Axes, lines: pd.DataFrame) -> None:
    """Names at the right end of the lines, moved apart where they would overlap.

    A line whose end lies below the panel is named at its foot, with the value.
    """
    ax.margins(x=0.02)
    ax.get_xlim()  # settles the limits, which the transforms below need
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = {name: lines[name].dropna() for name in lines.columns}
    points = {
        name: (
            end.index[-1],
            end.iloc[-1],
            float(to_axes.transform((end.index[-1], end.iloc[-1]))[1]),
        )
        for name, end in ends.items()
        if len(end)
    }
    names = sorted(points, key=lambda n: points[n][2])
    heights = apart([max(points[name][2], 0.0) for name in names], gap=0.07)
    for name, height in zip(names, heights, strict=True):
        color, (_, value, at) = style(name).color, points[name]
        look: dict[str, Any] = {"va": "center", "fontsize": 8, "color": color, "parse_math": False}
        if at < 0:  # no annotation, which is not drawn for a point outside
            ax.text(1.04, height, _hidden(name, value), transform=ax.transAxes, **look)
            continue
        ax.annotate(
            short(name),
            xy=points[name][:2],
            xytext=(1.04, height),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "relpos": (0, 0.5)},
            **look,
        )


def label_hidden(ax: Axes, lines: pd.DataFrame) -> None:
    """The lines that end below the panel, with their values, on a strip added under the others."""
    ends = {
        str(name): float(lines[name].dropna().iloc[-1]) for name in lines.dropna(axis=1, how="all")
    }
    low, high = ax.get_ylim()
    hidden = {name: value for name, value in ends.items() if value < low}
    if not hidden:
        return
    strip = 0.09  # of the panel, a line of text
    ax.set_ylim(low - (high - low) * strip * len(hidden) / (1 - strip * len(hidden)), high)
    for number, (name, value) in enumerate(hidden.items()):
        text, color = _hidden(name, value), style(name).color
        at = (0.02, 0.02 + strip * number)
        ax.text(*at, text, transform=ax.transAxes, fontsize=8, color=color, parse_math=False)


def _hidden(name: str, value: float) -> str:
    return f"{short(name)} ↓ {value:.3f}"


def log_axis(axis: Axis) -> None:
    """A log scale with plain numbers; 2 and 5, too, where there are few powers of ten."""
    (axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high / low < _FEW else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter("{x:g}" if low > 1e-5 else LogFormatterSciNotation())
    axis.set_minor_formatter(NullFormatter())


def name_axes(ax: Axes, title: str, x: str, y: str) -> None:
    """The title of a panel, on the left, and the names of its axes."""
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)


def say(ax: Axes, text: str) -> None:
    """Words in the middle of a panel that has nothing to draw."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=GREY)
