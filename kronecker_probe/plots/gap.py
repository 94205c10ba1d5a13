"""The figure of a gap decomposition: a stacked bar a layer; table in, Axes out; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kronecker_probe.errors import InvalidInputError, unknown_name
from kronecker_probe.plots.panels import GREY, Panels
from kronecker_probe.table.read import PLUGIN, shape, short

# in the order of the chain; colours of Okabe & Ito (2008), neighbours far apart in lightness too
COMPONENTS = {
    "kronecker-limit": ("limit of the Kronecker form", "#999999"),
    "rule": ("rule, beside the optimum", "#0072b2"),
    "labels": ("label gap: true, not sampled", "#e69f00"),
    "batch-gradients": ("batch-gradient gap", "#f0e442"),
    "staleness": ("staleness", "#cc79a7"),
}
MAX_BARS = 24  # unless parameters= asks for more
_ROOM = 0.045  # the share of the axis that a number needs to stand in its segment
_DARK = ("#0072b2",)
_NOTHING = 5e-4  # what three decimals do not show


def plot_gap(
    table: pd.DataFrame,
    parameters: Sequence[str] | None = None,
    *,
    axes: Axes | None = None,
    figure: Figure | None = None,
) -> Axes:
    """What each cause adds to the squared error 1 - cos² of a layer: a stacked bar a layer.

    Positive contributions are stacked to the right of zero, negative ones to the left; the
    diamond is their sum. All are plug-in numbers, as the title says.

    Args:
        table: the table of ``kp.decompose_gap(...)``.
        parameters: which layers, in which order; by default the first 24.
        axes: the Axes to draw into.
        figure: an empty figure to draw into; it is resized to fit.

    Returns:
        The Axes.

    Raises:
        UnknownNameError: no such parameter.
        InvalidInputError: the table is no gap decomposition.
    """
    if not {"parameter", "component", "contribution", "rule"} <= set(table.columns):
        raise InvalidInputError(
            "plot_gap draws the table of kp.decompose_gap, with the columns parameter, component, "
            f"contribution and rule; got {', '.join(map(str, table.columns))}."
        )
    names = _chosen(table, parameters)
    shown = table[table["parameter"].isin(names)]
    panels = Panels.make(1, axes, figure, width=9.0, height=1.5 + 0.42 * len(names))
    ax = panels.axes[0]
    wide = shown.pivot_table(
        index="parameter", columns="component", values="contribution", dropna=False, sort=False
    )
    wide = wide.reindex(index=names, columns=[c for c in COMPONENTS if c in wide.columns])
    _draw_bars(ax, wide)
    ax.set_yticks(
        range(len(names)), [shape(table, name) for name in names], fontsize=8, parse_math=False
    )
    ax.set_ylim(len(names) - 0.4, -0.6)
    cut = table["parameter"].nunique() - len(names)
    more = f" (the first {len(names)} layers are drawn)" if parameters is None and cut else ""
    squared = "squared error at the best scale, 1 − cos²(H, P)"
    panels.finish(f"{gap_headline(shown)}{more} ({PLUGIN})", squared, "", legend=False)
    ax.grid(visible=False, axis="y")
    _draw_legend(ax, panels.figure)
    return ax  # type: ignore[no-any-return]


def _draw_legend(ax: Axes, figure: Figure | None) -> None:
    place: Callable[..., Any] = ax.legend if figure is None else figure.legend
    more: dict[str, Any] = {} if figure is None else {"loc": "outside lower center", "ncols": 3}
    place(*ax.get_legend_handles_labels(), fontsize=9, frameon=False, **more)


def _draw_bars(ax: Axes, wide: pd.DataFrame) -> None:
    values = wide.fillna(0.0).to_numpy()
    positive, negative = np.clip(values, 0, None), np.clip(values, None, 0)
    low, high = float(negative.sum(axis=1).min()), float(positive.sum(axis=1).max())
    span = (high - low) or 1.0
    ax.set_xlim(low - (0.03 * span if low < 0 else 0.0), high + 0.08 * span)
    rows = np.arange(len(wide))
    ends = {1: np.zeros(len(wide)), -1: np.zeros(len(wide))}
    for k, component in enumerate(wide.columns):
        text, color = COMPONENTS[str(component)]
        for sign, part in ((1, positive[:, k]), (-1, negative[:, k])):
            ax.barh(
                rows,
                part,
                left=ends[sign],
                height=0.62,
                color=color,
                edgecolor="white",
                linewidth=0.8,
                label=text if sign == 1 else None,
            )
            for row, width in enumerate(part):
                if abs(width) > _ROOM * span:
                    at = ends[sign][row] + width / 2
                    _write(ax, at, row, float(width), color)
            ends[sign] = ends[sign] + part
    ax.axvline(0.0, color="black", linewidth=0.8)
    totals = wide.sum(axis=1, min_count=1).to_numpy()
    ax.plot(totals, rows, linestyle="", marker="D", color="black", markersize=5, label="total")
    for row in rows[~np.isnan(totals)]:
        at = max(float(totals[row]), float(ends[1][row])) + 0.012 * span
        ax.text(at, row, f"{totals[row]:.3f}", va="center", fontsize=8, fontweight="bold")
    for row in rows[np.isnan(totals)]:
        ax.text(0.0, row, " undefined", va="center", fontsize=8, color=GREY)


def _write(ax: Axes, x: float, row: int, value: float, color: str) -> None:
    ax.text(
        x,
        row,
        f"{value:.3f}".replace("-", "−"),
        ha="center",
        va="center",
        fontsize=7.5,
        color="white" if color in _DARK else "black",
    )


def gap_headline(table: pd.DataFrame) -> str:
    """The cause with the largest mean contribution, its share, and the next one."""
    rule = f"the {short(str(table['rule'].iloc[0]))} approximation"
    known = table.dropna(subset=["contribution"])
    if known.empty:
        return f"No error of {rule} is defined in this table; its notes say why"
    layers = known["parameter"].nunique()
    means = known.groupby("component")["contribution"].sum() / layers
    ranked = means.sort_values(ascending=False, kind="stable")
    first, largest, total = str(ranked.index[0]), float(ranked.iloc[0]), float(means.sum())
    if largest < _NOTHING:
        return f"Nothing adds to the error of {rule}"
    over = f" (means of {layers} layers)" if layers > 1 else ""
    part = f"{_SUBJECTS[first]} is the largest part of the error of {rule}"
    title = f"{part}: {largest:.3f} of {total:.3f}{over}"
    if len(ranked) > 1 and ranked.iloc[1] >= _NOTHING:
        second = _SUBJECTS[str(ranked.index[1])]
        return f"{title}; next, {second[:1].lower()}{second[1:]}: {ranked.iloc[1]:.3f}"
    return f"{title}; nothing else adds to it"


_SUBJECTS = {
    "kronecker-limit": "The limit of the Kronecker form",
    "rule": "The rule",
    "labels": "The label gap",
    "batch-gradients": "The batch-gradient gap",
    "staleness": "Staleness",
}


def _chosen(table: pd.DataFrame, parameters: Sequence[str] | None) -> list[str]:
    known = [str(name) for name in table["parameter"].unique()]
    if parameters is None:
        return known[:MAX_BARS]
    asked = [parameters] if isinstance(parameters, str) else list(parameters)
    for name in asked:
        if name not in known:
            raise unknown_name("parameter", name, known)
    if not asked:
        raise InvalidInputError("parameters= is empty; name at least one, or leave it out.")
    return asked
