"""The figure of a training: loss and accuracy against the step; table in, Axes out; no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.findings import headlines as conclusions
from kronecker_probe.plots.panels import GREY, TICKS, Panels
from kronecker_probe.table.escaping import printable_table

_LOG_LOSS = 30.0  # a loss that falls by more is drawn on a log scale


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
    table = printable_table(table)
    logged = table[table["parameter"].isna() & table["value"].notna()]
    kinds = [k for k in ("loss", "accuracy") if logged["metric"].str.endswith(k).any()]
    if "loss" not in kinds or "step" not in table:
        raise InvalidInputError(
            "The table has no losses along steps, so there is no training to draw."
        )
    about_probe = table["approximation"].notna() | table["metric"].str.startswith("probe_")
    probed = np.unique(table.loc[about_probe, "step"].to_numpy())
    panels = Panels.make(len(kinds), axes, figure, width=4.6, height=3.0)
    for ax, kind in zip(panels.axes, kinds, strict=True):
        _draw_training(ax, logged[logged["metric"].str.endswith(kind)], probed)
        ax.set_title(kind, fontsize=9, loc="left")
    losses = logged.loc[logged["metric"].str.endswith("loss"), "value"]
    if losses.min() > 0 and losses.max() / losses.min() > _LOG_LOSS:
        panels.axes[0].set_yscale("log")
    elif losses.min() >= 0:
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
        color=GREY,
        label="probed step",
    )
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=TICKS))
    ax.legend(fontsize=8, frameon=False)


def _logged_name(metric: str) -> str:
    return metric.replace("_", " ").replace("train ", "training ").replace("probe ", "probe set ")
