"""Figures of a measurement table: one function a figure, table in, Axes out; no torch.

Every function draws into ``axes`` or ``figure`` where one is given; otherwise it makes a pyplot
figure, which a notebook shows and ``matplotlib.pyplot.show()`` opens. Titles state what to conclude
and are computed from the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from kronecker_probe.errors import InvalidInputError, unknown_name
from kronecker_probe.findings import headlines as conclusions
from kronecker_probe.plots.panels import (
    GREY,
    SHADE,
    TICKS,
    Panels,
    in_view,
    label_ends,
    label_hidden,
    limits,
    marked_steps,
    say,
    set_step_axis,
    style,
)
from kronecker_probe.table.escaping import printable, printable_table
from kronecker_probe.table.metric_info import metric_info
from kronecker_probe.table.numbers import Number
from kronecker_probe.table.optimum_gaps import RULES
from kronecker_probe.table.read import (
    PLUGIN,
    abstentions,
    at_step,
    check_metric,
    first_shares,
    label,
    scores,
    shape,
    short,
    vectors,
    vectors_told,
)

# All layers are drawn up to the first number, beyond it the second one, unless parameters= asks.
MAX_PANELS, OF_MANY = 24, 12
_ROUNDING = 1e-9  # singular values below this share of the first are not resolved
_FEW_LINES = 3  # up to so many, all have their intervals drawn
_DIRECT_LABELS = 6  # beyond so many panels, one legend takes the place of labels at the lines


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
    product, and the region beyond it is shaded; only other structures can enter it. Whiskers are
    the 95 % intervals of estimates, at the steps that have a marker: those of the optimum and,
    among more than three lines, of the closest rule alone. A parameter whose estimates
    abstain at some step is drawn in plug-in numbers at all of them, and its title says so.

    Args:
        table: a measurement table with a ``step`` column.
        parameters: which parameters, in which order; by default the first 24.
        metric: as the table names it: "cosine", "kl_divergence:damping=0.001", ...
        axes: one Axes per parameter to draw into.
        figure: an empty figure to draw into; it is resized to fit.

    Returns:
        The Axes, one per parameter.

    Raises:
        UnknownNameError: no such metric or parameter.
        InvalidInputError: the table has no steps or no values of ``metric``, or ``axes`` are too
            few or too many.
    """
    table = printable_table(table)
    if "step" not in table:
        raise InvalidInputError(
            "The table has no 'step' column, so there is no trajectory; use plot_ladder."
        )
    wide = _scores(table, metric)
    names = _chosen(table, wide.index.get_level_values("parameter").unique(), parameters)
    panels = Panels.make(
        len(names), axes, figure, width=3.6, height=3.2 if len(names) <= 6 else 2.7
    )
    shown = wide[wide.index.get_level_values("parameter").isin(names)]
    ends = [end[_with_whiskers(shown, metric)] for end in _ends(table, metric, shown)]
    view = limits(in_view(shown, metric, ends), metric)
    why = abstentions(table, metric)
    for ax, name in zip(panels.axes, names, strict=True):
        lines = pd.DataFrame(shown.xs(name, level="parameter"))
        bars = [pd.DataFrame(end.xs(name, level="parameter")) for end in ends]
        _set_title(ax, shape(table, name), why.get(name))
        ax.set_yscale("log" if view.log else "linear")
        ax.set_ylim(view.low, view.high)
        set_step_axis(ax, lines.index.to_numpy())
        _draw_lines(ax, lines, bars, metric)
        if len(names) <= _DIRECT_LABELS:
            label_ends(ax, lines)
        else:
            label_hidden(ax, lines)
    panels.finish(
        _title(table, wide, names, parameters, metric),
        "optimizer step",
        metric_info(metric).axis,
        legend=len(names) > _DIRECT_LABELS,
    )
    return panels.axes


def _ends(table: pd.DataFrame, metric: str, shown: pd.DataFrame) -> list[pd.DataFrame]:
    """The lower and the upper ends of the intervals, for the rows and columns of ``shown``."""
    return [
        scores(table, metric, end).reindex(index=shown.index, columns=shown.columns)
        for end in ("low", "high")
    ]


def _set_title(ax: Axes, name: str, why: str | None) -> None:
    text = f"{name}\n({why})" if why else name
    ax.set_title(text, fontsize=9, loc="left", parse_math=False)


def _with_whiskers(shown: pd.DataFrame, metric: str) -> list[str]:
    """The lines whose intervals are drawn: of many, the optimum and the rule closest to it."""
    names = [str(name) for name in shown.columns]
    if len(names) <= _FEW_LINES:
        return names
    means = shown[[name for name in names if name in RULES]].mean().dropna()
    best = (
        [str(means.idxmax() if metric_info(metric).better == "higher" else means.idxmin())]
        if len(means)
        else []
    )
    return [name for name in names if name == "optimal" or name in best] or names


def _draw_lines(ax: Axes, lines: pd.DataFrame, bars: Sequence[pd.DataFrame], metric: str) -> None:
    steps = lines.index.to_numpy()
    low, high = ax.get_ylim()
    if "optimal" in lines and metric_info(metric).bounded:
        beyond = high if metric_info(metric).better == "higher" else low
        ax.fill_between(steps, lines["optimal"], beyond, color=SHADE, linewidth=0, zorder=0)
    for number, name in enumerate(lines.columns):
        drawn = np.flatnonzero(lines[name].notna())
        if not len(drawn):
            continue
        look = style(name)
        # staggered, so that lines which coincide still show both their markers
        marked = [int(drawn[i]) for i in marked_steps(ax, steps[drawn], number, len(lines.columns))]
        if name in bars[0]:
            lower, upper = (end[name].to_numpy()[marked] for end in bars)
            ax.vlines(steps[marked], lower, upper, color=look.color, linewidth=1.4, zorder=2.5)
        ax.plot(
            steps,
            lines[name].to_numpy(),
            color=look.color,
            linestyle=look.line,
            linewidth=2.4 if name == "optimal" else 1.5,
            marker="o" if name == "optimal" and len(steps) == 1 else look.marker,
            markersize=5,
            markevery=marked,
            label=label(name),
            zorder=2 if name == "optimal" else 3,
        )
    if not lines.notna().any(axis=None):
        say(ax, "undefined")


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

    A pale bar under a marker is the 95 % interval of an estimate.

    Args:
        table: a measurement table; ``step`` may be missing (one shot).
        step: a probed step; by default the last.
        metric: as the table names it: "cosine", "kl_divergence:damping=0.001", ...
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
    check_metric(metric, table)
    table = at_step(printable_table(table), step)
    wide = _scores(table, metric)
    names = _chosen(table, wide.index.get_level_values("parameter").unique(), parameters)
    panels = Panels.make(len(names), axes, figure, width=3.9, height=2.1, columns=3)
    shown, *ends = (one.droplevel("step").loc[names] for one in (wide, *_ends(table, metric, wide)))
    view = limits(in_view(shown, metric, ends), metric)
    why = abstentions(table, metric)
    for ax, name in zip(panels.axes, names, strict=True):
        ax.set_xscale("log" if view.log else "linear")
        ax.set_xlim(view.low, view.high)
        bars = pd.concat([end.loc[name] for end in ends], axis=1, keys=["low", "high"])
        _draw_rungs(ax, pd.Series(shown.loc[name]), bars, metric)
        _set_title(ax, shape(table, name), why.get(name))
    when = f"At step {wide.index[0][0]}: " if "step" in table else ""
    title = when + _title(table, wide, names, parameters, metric)
    panels.finish(title, metric_info(metric).axis, "", legend=False)
    return panels.axes


def _draw_rungs(ax: Axes, values: pd.Series[Any], bars: pd.DataFrame, metric: str) -> None:
    info = metric_info(metric)
    higher = info.better == "higher"
    ranked = values.sort_values(ascending=not higher, na_position="last", kind="stable")
    bound = float(values.get("optimal", np.nan)) if info.bounded else np.nan
    bounded = np.isfinite(bound)
    if bounded:
        ax.axvspan(bound, ax.get_xlim()[higher], color=SHADE, zorder=0)
        ax.axvline(bound, color=style("optimal").color, linewidth=1.2, zorder=1)
    for rung, (name, value) in enumerate(ranked.items()):
        look, defined = style(str(name)), np.isfinite(value)
        ax.annotate(
            f"{value:.3f}" if defined else "undefined",
            (1.02, rung),
            xycoords=("axes fraction", "data"),
            verticalalignment="center",
            fontsize=8,
            color="black" if defined else GREY,
        )
        if not defined:
            continue
        left, right = (float(bars[end].loc[str(name)]) for end in bars)
        ax.hlines(rung, left, right, color=look.color, linewidth=7, alpha=0.35, zorder=1.5)
        if bounded:
            ax.plot([bound, value], [rung, rung], color=look.color, linewidth=1.5, zorder=2)
        at, marker = float(value), "o" if name == "optimal" else look.marker
        if at < ax.get_xlim()[0]:  # an arrowhead at the edge
            at, marker = ax.get_xlim()[0], "<"
        ax.plot(
            [at], [rung], color=look.color, marker=marker, markersize=7, clip_on=False, zorder=3
        )
    names = [short(str(name)) for name in ranked.index]
    ax.set_yticks(range(len(ranked)), names, fontsize=8, parse_math=False)
    ax.set_ylim(len(ranked) - 0.4, -0.6)
    if ax.get_xscale() == "linear":
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

    They are those of the sample matrix (plug-in numbers), as the title says. The first over
    ||H|| is the cosine of the optimal Kronecker product; the slower the others fall, the less any
    one product can capture.

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
    table = printable_table(table)
    rows = table[table["metric"] == "singular_value"]
    if rows.empty:
        raise InvalidInputError(
            "The table has no singular values to draw (a spectrum was not kept)."
        )
    if step is None and "step" in table:
        step = int(rows["step"].max())
    table = at_step(table, step)
    rows = table[table["metric"] == "singular_value"]
    names = _chosen(table, rows["parameter"].unique(), parameters)
    shares, estimated = first_shares(table), conclusions.population_optimum(table)
    panels = Panels.make(len(names), axes, figure, width=3.2, height=2.4)
    spectra = {name: _relative(rows[rows["parameter"] == name]) for name in names}
    floor = min((float(one.min()) for one in spectra.values() if len(one)), default=1.0)
    for ax, name in zip(panels.axes, names, strict=True):
        ax.set_title(shape(table, name), fontsize=9, loc="left", parse_math=False)
        ax.set_yscale("log")
        ax.set_ylim(floor / 2, 2.5)
        _draw_spectrum(ax, spectra[name], shares.get(name), estimated.get(name))
    when = f"At step {step}: " if step is not None else ""
    title = when + conclusions.spectrum_headline(table[table["parameter"].isin(names)])
    title += f" (drawn: {PLUGIN})"
    remark = vectors_told(table) if parameters is None else ""
    title += f"; {remark}" if remark else ""
    panels.finish(title, "k (rank of the singular value)", "σₖ / σ₁", legend=False)
    return panels.axes


def _relative(rows: pd.DataFrame) -> NDArray[np.float64]:
    """Singular values over the first, by rank, down to where rounding begins; empty for H = 0."""
    values = rows.sort_values("index")["value"].to_numpy()
    if not values[0] > 0:
        return np.empty(0)
    relative: NDArray[np.float64] = values / values[0]
    return relative[relative > _ROUNDING]


def _draw_spectrum(
    ax: Axes, relative: NDArray[np.float64], share: float | None, estimated: Number | None
) -> None:
    if not len(relative):
        say(ax, "undefined (H = 0)")
        return
    ax.plot(
        np.arange(1, len(relative) + 1),
        relative,
        color=style("shampoo-squared").color,
        linewidth=1.2,
        marker="o" if len(relative) <= 64 else "",
        markersize=3.5,
    )
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=TICKS))
    if share is not None:
        text = f"σ₁/‖H‖, sample: {share:.3f}"
        text += f"\npopulation: {estimated}" if estimated else ""
        ax.text(0.96, 0.93, text, transform=ax.transAxes, fontsize=8, ha="right", va="top")


def _scores(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    wide = scores(table, metric)
    if wide.empty:
        raise InvalidInputError(f"The table has no values of metric {metric!r} to draw.")
    return wide


def _chosen(
    table: pd.DataFrame, available: Iterable[Any], parameters: Sequence[str] | None
) -> list[str]:
    """Those asked for; by default the first ones, without vectors where there are matrices."""
    known = [str(name) for name in available]
    if parameters is None:
        narrow = set(vectors(table))
        found = [name for name in known if name not in narrow] or known
        return found if len(found) <= MAX_PANELS else found[:OF_MANY]
    asked = [parameters] if isinstance(parameters, str) else list(parameters)
    asked = [printable(name, keep="") for name in asked]
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
    if parameters is not None:
        return conclusions.headline(table[table["parameter"].isin(names)], metric)
    left_out, remark = set(vectors(table)), vectors_told(table)
    layers = set(wide.index.get_level_values("parameter"))
    count = len(layers - left_out if remark else layers)
    cut = f" (the first {len(names)} of {count} layers are drawn)" if count > len(names) else ""
    return conclusions.headline(table, metric) + cut + (f"; {remark}" if remark else "")
