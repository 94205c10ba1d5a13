"""The figure of several runs: loss and cosines against the step; table in, Axes out."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.plots.panels import TICKS, Panels
from kronecker_probe.table.escaping import printable_table

# Okabe & Ito (2008); beyond the seventh the markers and lines tell
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "os^Dv<>Ph"
_LINES = ("-", "--", "-.", ":")
# More layers than these are shown as their mean and range.
_PANELS = 5
_ACROSS = 52  # letters over a panel
_LOG_LOSS = 30.0  # a loss that falls by more is drawn on a log scale


def plot_comparison(
    table: pd.DataFrame, *, failed: Collection[str] = (), figure: Figure | None = None
) -> NDArray[Any]:
    """Loss, and the cosine to H of what each optimizer holds, against the step.

    One colour, marker and line an optimizer. Layers have a panel each; where they are more than
    five there is one panel, with the mean over matrices and the range from the worst to the best.
    The axis of the loss ends at twice the initial loss, where a run leaves it and another stays.

    Args:
        table: As of :meth:`Comparison.table`.
        failed: The optimizers whose runs failed; the title is not about them.
        figure: An empty figure to draw into; it is resized to fit.

    Returns:
        The Axes: loss first.

    Raises:
        InvalidInputError: The table has no losses.
    """
    table = printable_table(table)
    losses = table[table["metric"].isin(["probe_loss", "train_loss"])]
    if losses.empty:
        raise InvalidInputError("The table has no losses along steps; there is nothing to draw.")
    live = table[table["metric"] == "in_use_cosine"]
    whole = _matrices(live)
    if live["parameter"].nunique() > _PANELS and len(whole):
        live = whole
    layers = [str(name) for name in live["parameter"].unique()]
    single = len(layers) <= _PANELS
    shown = layers if single else layers[:1]
    panels = Panels.make(1 + len(shown), None, figure, width=3.9, height=3.1, columns=3)
    labels = _labels(table, failed)
    _draw_loss(panels.axes[0], losses, labels, _ceiling(losses, failed))
    low = min(0.0, 1.1 * float(live["value"].min())) if len(live) else 0.0
    for ax, layer in zip(panels.axes[1:], shown, strict=True):
        of = live[live["parameter"] == layer] if single else live
        _draw_cosines(ax, of, labels, low)
        kind = "matrices" if len(whole) else "layers"
        name = layer if single else f"mean and range of {len(layers)} {kind}"
        title = ax.set_title(f"cosine to H in use: {name}", fontsize=9, loc="left")
        title.set_parse_math(False)
    title = _headline(losses, whole, failed)
    panels.finish(title, "optimizer step", "", legend=False)
    _legend(panels)
    return panels.axes


def _legend(panels: Panels) -> None:
    """All runs under the panels, in as many columns as their labels leave room for."""
    handles, labels = panels.axes[0].get_legend_handles_labels()
    assert panels.figure is not None
    letters = 12 * panels.figure.get_size_inches()[0]  # of 9 points
    columns = max(1, int(letters // (8 + max(map(len, labels)))))
    drawn = panels.figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(columns, len(labels)),
        fontsize=9,
        frameon=False,
    )
    for text in drawn.get_texts():
        text.set_parse_math(False)


def _labels(table: pd.DataFrame, failed: Collection[str]) -> dict[str, str]:
    """Each optimizer with its learning rate, for the legend."""
    rates = table.groupby("optimizer", sort=False)["lr"].first()
    return {
        str(name): f"{name}, lr {rate}" + (" (failed)" if name in failed else "")
        for name, rate in rates.items()
    }


def _matrices(rows: pd.DataFrame) -> pd.DataFrame:
    """Without vectors, whose H one Kronecker product is itself."""
    return rows.query("m > 1 and n > 1")


def _headline(losses: pd.DataFrame, matrices: pd.DataFrame, failed: Collection[str]) -> str:
    """Which optimizer ends at the lowest loss, and which holds the matrix nearest to its H."""
    metric = "probe_loss" if (losses["metric"] == "probe_loss").any() else "train_loss"
    ends = _ends(losses[losses["metric"] == metric], failed)
    if ends.empty:
        return "No run came to its end"
    lowest = str(ends.idxmin())
    rate = losses.loc[losses["optimizer"] == lowest, "lr"].iloc[0]
    title = f"{lowest} ends at the lowest loss ({ends[lowest]:.3g}, lr {rate})"
    held = _ends(matrices, failed)
    if held.empty:
        return title
    nearest = str(held.idxmax())
    count = matrices.loc[matrices["optimizer"] == nearest, "parameter"].nunique()
    over = f"over {count} matrices" if count > 1 else "of one matrix"
    holds = (
        f"holds the matrix nearest to H, each at its own weights (mean cosine {held[nearest]:.2f} "
        f"{over})"
    )
    return f"{title} and {holds}" if nearest == lowest else f"{title}; {nearest} {holds}"


def _ends(rows: pd.DataFrame, failed: Collection[str]) -> pd.Series[float]:
    """The values at the last step of all runs that did not fail, the mean over layers."""
    whole = rows[~rows["optimizer"].isin([*failed])]
    final = whole[whole["step"] == whole["step"].max()]
    means: pd.Series[float] = final.groupby("optimizer", sort=False)["value"].mean()
    return means


def _style(number: int) -> dict[str, Any]:
    return {
        "color": _COLORS[number % len(_COLORS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _LINES[number % len(_LINES)],
        "markersize": 4,
        "linewidth": 1.5,
    }


def _draw_loss(ax: Axes, losses: pd.DataFrame, labels: dict[str, str], top: float) -> None:
    """Losses of the probe set as lines up to ``top``; those of the training batches pale behind."""
    told = ["loss (pale: training batches)"]
    for place, (name, label) in enumerate(labels.items()):
        of = losses[losses["optimizer"] == name].sort_values("step")
        probe, train = (of[of["metric"] == metric] for metric in ("probe_loss", "train_loss"))
        style = _style(place)
        pale = {"color": style["color"], "linewidth": 0.8, "alpha": 0.35}
        ax.plot(train["step"].to_numpy(), train["value"].to_numpy(), **pale)
        line = probe if len(probe) else train
        ax.plot(line["step"].to_numpy(), line["value"].to_numpy(), label=label, **style)
        if (above := line[line["value"] > top]).empty:
            continue
        first = int(above["step"].iloc[0])
        line_told = f"{name} leaves the axis at step {first} (up to {above['value'].max():.2g})"
        told.append(textwrap.fill(line_told, _ACROSS, break_on_hyphens=False))
        ax.plot(first, 0.98, color=style["color"], marker="^", transform=ax.get_xaxis_transform())
    _limit(ax, losses["value"], top)
    ax.set_title("\n".join(told), fontsize=9, loc="left").set_parse_math(False)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=TICKS))


def _ceiling(losses: pd.DataFrame, failed: Collection[str]) -> float:
    """Twice the initial loss where a run goes beyond it and one that did not fail ends below.

    Infinite elsewhere: without such a run the others are what there is to see.
    """
    metric = "probe_loss" if (losses["metric"] == "probe_loss").any() else "train_loss"
    runs = losses[losses["metric"] == metric].sort_values("step").groupby("optimizer")["value"]
    top = 2.0 * float(runs.first().max())
    stays = bool((runs.last().drop([*failed], errors="ignore") <= top).any())
    return top if stays and losses["value"].max() > top > 0 else math.inf


def _limit(ax: Axes, values: pd.Series[float], top: float) -> None:
    """The scale of the losses, and its end where there is one."""
    shown = values[(values <= top) & (values < math.inf)]
    low, high = float(shown.min()), float(shown.max()) if math.isinf(top) else top
    log = low > 0 and high / low > _LOG_LOSS
    if log:
        ax.set_yscale("log")
    if math.isfinite(top):
        ax.set_ylim(low / 1.3 if log else low - 0.05 * (high - low), top)


def _draw_cosines(ax: Axes, live: pd.DataFrame, labels: dict[str, str], low: float) -> None:
    for place, (name, label) in enumerate(labels.items()):
        of = live[live["optimizer"] == name].groupby("step")["value"]
        mean, worst, best = of.mean(), of.min(), of.max()
        steps = mean.index.to_numpy()
        if (best > worst).any():
            shade = {"color": _style(place)["color"], "alpha": 0.12, "lw": 0}
            ax.fill_between(steps, worst.to_numpy(), best.to_numpy(), **shade)
        ax.plot(steps, mean.to_numpy(), label=label, **_style(place))
    ax.set_ylim(low, 1.02)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=TICKS))
