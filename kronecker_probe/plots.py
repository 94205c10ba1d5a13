"""Figures of a measurement table: one function a figure, table in, Axes out; no torch.

Every function draws into ``axes`` or ``figure`` where one is given; otherwise it makes a pyplot
figure, which a notebook shows and ``matplotlib.pyplot.show()`` opens. Titles state what to conclude
and are computed from the table.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from kronecker_probe import conclusions
from kronecker_probe.conclusions import METRICS, check_metric, label
from kronecker_probe.errors import InvalidInputError, unknown_name

MAX_PANELS = 24  # unless parameters= asks for more
_DIRECT_LABELS = 6  # beyond so many panels, one legend takes the place of labels at the lines
_GREY = "#666666"
_SHADE = "#ececec"


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
    "live": Style("#56b4e9", "*", (0, (6, 1, 1, 1, 1, 1))),
}
_OTHER = Style(_GREY, "P", (0, (4, 1, 1, 1)))


def plot_trajectory(
    table: pd.DataFrame,
    parameters: Sequence[str] | None = None,
    metric: str = "cosine",
    *,
    axes: Axes | Iterable[Axes] | None = None,
    figure: Figure | None = None,
) -> NDArray[Any]:
    """A quality number against the step: a panel per parameter, a line per approximation.

    The optimal Kronecker product is the ceiling (for errors, the floor) of every Kronecker
    product, and the region beyond it is shaded; only other structures can enter it.

    Args:
        table: a measurement table with a ``step`` column.
        parameters: which parameters, in which order; by default the first 24.
        metric: "cosine", "relative_error", "best_scale_error" or "best_scale".
        axes: one Axes per parameter to draw into.
        figure: an empty figure to draw into; it is resized to fit.

    Returns:
        The Axes, one per parameter.

    Raises:
        UnknownNameError: no such metric or parameter.
        InvalidInputError: the table has no steps or no values of ``metric``, or ``axes`` are too
            few or too many.
    """
    if "step" not in table:
        raise InvalidInputError(
            "The table has no 'step' column, so there is no trajectory; use plot_ladder."
        )
    wide = _scores(table, metric)
    names = _chosen(wide.index.get_level_values("parameter").unique(), parameters)
    panels = _Panels.make(len(names), axes, figure, width=3.6, height=2.7)
    shown = wide[wide.index.get_level_values("parameter").isin(names)]
    low, high = _limits(shown.to_numpy(), metric)
    for ax, name in zip(panels.axes, names, strict=True):
        lines = shown.xs(name, level="parameter")
        _draw_lines(ax, lines, metric, (low, high))
        ax.set_title(_shape(table, name), fontsize=9, loc="left")
        ax.set_ylim(low, high)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if len(names) <= _DIRECT_LABELS:
            _label_ends(ax, lines)
    panels.finish(
        _title(table, wide, names, parameters, metric),
        "optimizer step",
        METRICS[metric],
        legend=len(names) > _DIRECT_LABELS,
    )
    return panels.axes


def _draw_lines(
    ax: Axes, lines: pd.DataFrame, metric: str, limits: tuple[float, float]
) -> None:
    steps = lines.index.to_numpy()
    if "optimal" in lines and metric != "best_scale":
        beyond = limits[1] if metric == "cosine" else limits[0]
        ax.fill_between(steps, lines["optimal"], beyond, color=_SHADE, linewidth=0, zorder=0)
    for number, name in enumerate(lines.columns):
        if lines[name].isna().all():
            continue
        style = STYLES.get(name, _OTHER)
        defined = lines[name].notna().to_numpy()
        every = max(1, int(defined.sum()) // 7)
        ax.plot(
            steps,
            lines[name].to_numpy(),
            color=style.color,
            linestyle=style.line,
            linewidth=2.4 if name == "optimal" else 1.5,
            marker="o" if name == "optimal" and len(steps) == 1 else style.marker,
            markersize=5,
            markevery=(number % every, every),
            label=label(name),
            zorder=2 if name == "optimal" else 3,
        )
    if not lines.notna().any(axis=None):
        _say(ax, "undefined")


def _label_ends(ax: Axes, lines: pd.DataFrame) -> None:
    """Names at the right end of the lines, moved apart where they would overlap."""
    low, high = ax.get_ylim()
    ends = {name: lines[name].dropna() for name in lines.columns}
    heights = {n: float((e.iloc[-1] - low) / (high - low)) for n, e in ends.items() if len(e)}
    names = sorted(heights, key=lambda name: heights[name])
    spread = _apart([heights[name] for name in names], gap=0.075)
    for name, height in zip(names, spread, strict=True):
        color = STYLES.get(name, _OTHER).color
        ax.annotate(
            _short(name),
            xy=(1.0, heights[name]),
            xytext=(1.05, height),
            xycoords="axes fraction",
            verticalalignment="center",
            fontsize=8,
            color=color,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "shrinkA": 0},
        )


def _apart(positions: list[float], gap: float) -> list[float]:
    """Ascending positions moved as little as needed to lie ``gap`` apart.

    Least squares under the order: with i * gap taken off, this is isotonic regression, solved by
    pooling adjacent violators.
    """
    pools: list[tuple[float, int]] = []  # (mean, count)
    for number, position in enumerate(positions):
        mean, count = position - number * gap, 1
        while pools and pools[-1][0] > mean:
            other, size = pools.pop()
            mean, count = (mean * count + other * size) / (count + size), count + size
        pools.append((mean, count))
    flat = [mean for mean, count in pools for _ in range(count)]
    return [value + number * gap for number, value in enumerate(flat)]


def plot_ladder(
    table: pd.DataFrame,
    step: int | None = None,
    metric: str = "cosine",
    *,
    parameters: Sequence[str] | None = None,
    axes: Axes | Iterable[Axes] | None = None,
    figure: Figure | None = None,
) -> NDArray[Any]:
    """All approximations at one step, best first: a panel per parameter, a rung each.

    Args:
        table: a measurement table; ``step`` may be missing (one shot).
        step: a probed step; by default the last.
        metric: "cosine", "relative_error", "best_scale_error" or "best_scale".
        parameters: which parameters, in which order; by default the first 24.
        axes: one Axes per parameter to draw into.
        figure: an empty figure to draw into; it is resized to fit.

    Returns:
        The Axes, one per parameter.

    Raises:
        UnknownNameError: no such metric or parameter.
        InvalidInputError: ``step`` was not probed, the table has no values of ``metric``, or
            ``axes`` are too few or too many.
    """
    check_metric(metric)
    table = at_step(table, step)
    wide = _scores(table, metric)
    names = _chosen(wide.index.get_level_values("parameter").unique(), parameters)
    panels = _Panels.make(len(names), axes, figure, width=3.9, height=2.1, columns=3)
    shown = wide.droplevel("step").loc[names]
    limits = _limits(shown.to_numpy(), metric)
    for ax, name in zip(panels.axes, names, strict=True):
        _draw_rungs(ax, shown.loc[name], metric, limits)
        ax.set_title(_shape(table, name), fontsize=9, loc="left")
    when = f"At step {wide.index[0][0]}: " if "step" in table else ""
    title = when + _title(table, wide, names, parameters, metric)
    panels.finish(title, METRICS[metric], "", legend=False)
    return panels.axes


def _draw_rungs(
    ax: Axes, values: pd.Series[Any], metric: str, limits: tuple[float, float]
) -> None:
    ranked = values.sort_values(ascending=metric != "cosine", na_position="last", kind="stable")
    base = float(values.get("optimal", np.nan))
    ax.set_xlim(*limits)
    if base == base and metric != "best_scale":
        ax.axvspan(base, limits[1] if metric == "cosine" else limits[0], color=_SHADE, zorder=0)
        ax.axvline(base, color=STYLES["optimal"].color, linewidth=1.2, zorder=1)
    for rung, (name, value) in enumerate(ranked.items()):
        style = STYLES.get(str(name), _OTHER)
        at_edge = {"xycoords": ("axes fraction", "data"), "fontsize": 8, "va": "center"}
        if value != value:
            ax.annotate("undefined", (1.02, rung), color=_GREY, **at_edge)  # type: ignore[arg-type]
            continue
        if base == base and metric != "best_scale":
            ax.plot([base, value], [rung, rung], color=style.color, linewidth=1.5, zorder=2)
        marker = "o" if name == "optimal" else style.marker
        ax.plot([value], [rung], color=style.color, marker=marker, markersize=7, zorder=3)
        ax.annotate(f"{value:.3f}", (1.02, rung), **at_edge)  # type: ignore[arg-type]
    ax.set_yticks(range(len(ranked)), [_short(str(name)) for name in ranked.index], fontsize=8)
    ax.set_ylim(len(ranked) - 0.4, -0.6)
    ax.xaxis.set_major_locator(MaxNLocator(5))


def plot_spectrum(
    table: pd.DataFrame,
    step: int | None = None,
    *,
    parameters: Sequence[str] | None = None,
    axes: Axes | Iterable[Axes] | None = None,
    figure: Figure | None = None,
) -> NDArray[Any]:
    """Kronecker singular values relative to the largest: a panel per parameter, log scale.

    The first over ||H|| is the cosine of the optimal Kronecker product; the slower the others
    fall, the less any one product can capture.

    Args:
        table: a measurement table; ``step`` may be missing (one shot).
        step: a probed step; by default the last one with singular values.
        parameters: which parameters, in which order; by default the first 24.
        axes: one Axes per parameter to draw into.
        figure: an empty figure to draw into; it is resized to fit.

    Returns:
        The Axes, one per parameter.

    Raises:
        UnknownNameError: no such parameter.
        InvalidInputError: ``step`` was not probed, the table has no singular values, or ``axes``
            are too few or too many.
    """
    rows = table[table["metric"] == "singular_value"]
    if rows.empty:
        raise InvalidInputError("The table has no singular values to draw (a spectrum was not kept).")
    if step is None and "step" in table:
        step = int(rows["step"].max())
    table = at_step(table, step)
    rows = table[(table["metric"] == "singular_value")].sort_values("index")
    names = _chosen(rows["parameter"].unique(), parameters)
    shares = conclusions.first_shares(table)
    panels = _Panels.make(len(names), axes, figure, width=3.2, height=2.4)
    for ax, name in zip(panels.axes, names, strict=True):
        values = rows.loc[rows["parameter"] == name, "value"].to_numpy()
        _draw_spectrum(ax, values, shares.get(name))
        ax.set_title(_shape(table, name), fontsize=9, loc="left")
    when = f"At step {step}: " if step is not None else ""
    title = when + conclusions.spectrum_headline(table[table["parameter"].isin(names)])
    panels.finish(title, "rank of the singular value", "relative to the largest", legend=False)
    return panels.axes


def _draw_spectrum(ax: Axes, values: NDArray[np.float64], share: float | None) -> None:
    ax.set_yscale("log")
    if not (len(values) and values[0] > 0):
        _say(ax, "undefined (H = 0)")
        return
    relative = values / values[0]
    ranks = np.arange(1, len(values) + 1)
    positive = relative > 0  # a log axis has no place for an exact zero
    color = STYLES["shampoo-squared"].color
    marker = {"marker": "o", "markersize": 3.5} if len(values) <= 64 else {}
    ax.plot(ranks[positive], relative[positive], color=color, linewidth=1.2, **marker)  # type: ignore[arg-type]
    # below 1e-9 of the largest there is rounding only
    ax.set_ylim(max(float(relative[positive].min()) / 3, 1e-9), 3)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if share is not None:
        text = f"σ₁/‖H‖ = {share:.3f}\n{100 * share**2:.0f} % of ‖H‖²"
        ax.text(0.96, 0.93, text, transform=ax.transAxes, fontsize=8, ha="right", va="top")


def plot_training(
    table: pd.DataFrame,
    *,
    axes: Axes | Iterable[Axes] | None = None,
    figure: Figure | None = None,
) -> NDArray[Any]:
    """Loss and, where it was logged, accuracy against the step, with the probed steps marked.

    Args:
        table: a measurement table with a ``step`` column.
        axes: one Axes for the loss, and one for the accuracy where there is any.
        figure: an empty figure to draw into; it is resized to fit.

    Returns:
        The Axes: loss, then accuracy.

    Raises:
        InvalidInputError: the table has no losses, or ``axes`` are too few or too many.
    """
    logged = table[table["parameter"].isna() & table["value"].notna()]
    kinds = [k for k in ("loss", "accuracy") if logged["metric"].str.endswith(k).any()]
    if "loss" not in kinds or "step" not in table:
        raise InvalidInputError("The table has no losses along steps, so there is no training to draw.")
    about_probe = table["approximation"].notna() | table["metric"].str.startswith("probe_")
    probed = np.unique(table.loc[about_probe, "step"].to_numpy())
    panels = _Panels.make(len(kinds), axes, figure, width=4.6, height=3.0)
    for ax, kind in zip(panels.axes, kinds, strict=True):
        _draw_training(ax, logged[logged["metric"].str.endswith(kind)], probed)
        ax.set_title(kind, fontsize=9, loc="left")
    panels.axes[0].set_ylim(bottom=0)
    if len(kinds) > 1:
        panels.axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels.finish(conclusions.training_headline(table), "optimizer step", "", legend=False)
    return panels.axes


def _draw_training(ax: Axes, logged: pd.DataFrame, probed: NDArray[np.int64]) -> None:
    palette = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
    # train first: its dense line lies under the sparse markers of the probe set
    for number, metric in enumerate(sorted(logged["metric"].unique(), reverse=True)):
        rows = logged[logged["metric"] == metric].sort_values("step")
        at_probes = len(rows) <= len(probed)
        ax.plot(
            rows["step"].to_numpy(),
            rows["value"].to_numpy(),
            color=palette[number % len(palette)],
            linewidth=1.2,
            marker="o" if at_probes else "",
            markersize=4,
            label=_logged_name(str(metric)),
        )
    ax.plot(
        probed,
        np.full(len(probed), 0.015),
        transform=ax.get_xaxis_transform(),
        linestyle="",
        marker="|",
        markersize=9,
        color=_GREY,
        label="probed step",
    )
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.legend(fontsize=8, frameon=False)


def at_step(table: pd.DataFrame, step: int | None) -> pd.DataFrame:
    """The rows of one probed step, by default the last; all rows of a table without steps.

    Raises:
        InvalidInputError: ``step`` was not probed; names the nearest one.
    """
    if "step" not in table:
        if step is not None:
            raise InvalidInputError(f"step={step}, but the table has no 'step' column; leave it out.")
        return table
    chosen = conclusions.last_step(table) if step is None else step
    probed = table.loc[table["parameter"].notna(), "step"].unique()
    if step is not None and step not in probed:
        near = min(probed, key=lambda other: abs(other - step)) if len(probed) else "none"
        raise InvalidInputError(f"Step {step} was not probed; the nearest probed step is {near}.")
    return table[table["step"] == chosen]


@dataclass(frozen=True)
class _Panels:
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
    ) -> _Panels:
        """``count`` Axes: those given, or new ones in a grid of panels of so many inches."""
        if axes is not None:
            given = [axes] if isinstance(axes, Axes) else list(np.ravel(np.asarray(axes)))
            if len(given) != count:
                raise InvalidInputError(f"axes= holds {len(given)} Axes, but there are {count} panels.")
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
            across = int(self.figure.get_size_inches()[0] * 11)
            self.figure.suptitle(
                textwrap.fill(title, across), x=0.01, ha="left", fontsize=11, fontweight="bold"
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
            place(list(handles.values()), list(handles), fontsize=9, frameon=False, **more)


def _array(axes: Sequence[Axes]) -> NDArray[Any]:
    array = np.empty(len(axes), dtype=object)
    array[:] = axes
    return array


def _scores(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    wide = conclusions.scores(table, metric)
    if wide.empty:
        raise InvalidInputError(f"The table has no values of metric {metric!r} to draw.")
    return wide


def _chosen(available: Iterable[Any], parameters: Sequence[str] | None) -> list[str]:
    known = [str(name) for name in available]
    if parameters is None:
        return known[:MAX_PANELS]
    asked = [parameters] if isinstance(parameters, str) else list(parameters)
    for name in asked:
        if name not in known:
            raise unknown_name("parameter", name, known)
    if not asked:
        raise InvalidInputError("parameters= is empty; name at least one, or leave it out.")
    return asked


def _title(
    table: pd.DataFrame,
    wide: pd.DataFrame,
    names: list[str],
    parameters: Sequence[str] | None,
    metric: str,
) -> str:
    count = wide.index.get_level_values("parameter").nunique()
    if parameters is not None:
        return conclusions.headline(table[table["parameter"].isin(names)], metric)
    cut = f" (the first {len(names)} of {count} layers are drawn)" if count > len(names) else ""
    return conclusions.headline(table, metric) + cut


def _shape(table: pd.DataFrame, name: str) -> str:
    """ "0.weight (64 × 128)"; the name alone where the table has no shapes."""
    rows = table[table["parameter"] == name]
    if "m" not in rows or rows["m"].dropna().empty or rows["n"].dropna().empty:
        return name
    return f"{name} ({rows['m'].dropna().iloc[0]} × {rows['n'].dropna().iloc[0]})"


def _short(name: str) -> str:
    return label(name).split(" (")[0]


def _logged_name(metric: str) -> str:
    return metric.replace("_", " ").replace("train ", "training ").replace("probe ", "probe set ")


def _limits(values: NDArray[np.float64], metric: str) -> tuple[float, float]:
    """Common limits of all panels, a little beyond the data."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    pad = 0.06 * (high - low) or 0.05
    top = min(high + pad, 1.02) if metric == "cosine" else high + pad
    return low - pad, max(top, high + 0.2 * pad)


def _say(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=_GREY)
