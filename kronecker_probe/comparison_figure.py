"""The figure of several runs: loss and live cosines against the step; table in, Axes out."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.panels import TICKS, Panels

# Okabe & Ito (2008); beyond the seventh the markers and lines tell
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "os^Dv<>Ph"
_LINES = ("-", "--", "-.", ":")
# More layers than these are shown as their mean and range.
_PANELS = 5
_LOG_LOSS = 30.0  # a loss that falls by more is drawn on a log scale


def plot_comparison(table: pd.DataFrame, *, figure: Figure | None = None) -> NDArray[Any]:
    """Loss, and the cosine to H of what each optimizer holds, against the step.

    One colour, marker and line an optimizer. Layers have a panel each; where they are more than
    five there is one panel, with their mean and the range from the worst to the best.

    Args:
        table: As of :meth:`Comparison.table`.
        figure: An empty figure to draw into; it is resized to fit.

    Returns:
        The Axes: loss first.

    Raises:
        InvalidInputError: The table has no losses.
    """
    losses = table[table["metric"].isin(["probe_loss", "train_loss"])]
    if losses.empty:
        raise InvalidInputError("The table has no losses along steps; there is nothing to draw.")
    live = table[table["metric"] == "live_cosine"]
    layers = [str(name) for name in live["parameter"].unique()]
    single = len(layers) <= _PANELS
    shown = layers if single else layers[:1]
    panels = Panels.make(1 + len(shown), None, figure, width=3.9, height=3.1, columns=3)
    optimizers = [str(name) for name in table["optimizer"].unique()]
    _draw_loss(panels.axes[0], losses, optimizers)
    for ax, layer in zip(panels.axes[1:], shown, strict=True):
        of = live[live["parameter"] == layer] if single else live
        _draw_cosines(ax, of, optimizers, min(0.0, 1.1 * float(live["value"].min())))
        name = layer if single else f"mean and range of {len(layers)} layers"
        title = ax.set_title(f"live cosine to H: {name}", fontsize=9, loc="left")
        title.set_parse_math(False)
    panels.finish(_headline(losses, live), "optimizer step", "", legend=True)
    return panels.axes


def _headline(losses: pd.DataFrame, live: pd.DataFrame) -> str:
    """Which optimizer ends at the lowest loss, and which holds the matrix nearest to H."""
    metric = "probe_loss" if (losses["metric"] == "probe_loss").any() else "train_loss"
    ends = _last(losses[losses["metric"] == metric]).dropna()
    if ends.empty:
        return "No loss is finite at the end"
    lowest = str(ends.idxmin())
    title = f"{lowest} ends at the lowest loss ({ends[lowest]:.3g})"
    held = _last(live).dropna()
    if held.empty:
        return title
    nearest = str(held.idxmax())
    holds = f"holds the matrix nearest to H (mean cosine {held[nearest]:.2f})"
    return f"{title} and {holds}" if nearest == lowest else f"{title}; {nearest} {holds}"


def _last(rows: pd.DataFrame) -> pd.Series[float]:
    """The value at each optimizer's own last step, the mean over layers."""
    final = rows[rows["step"] == rows.groupby("optimizer")["step"].transform("max")]
    return final.groupby("optimizer", sort=False)["value"].mean()


def _style(number: int) -> dict[str, Any]:
    return {
        "color": _COLORS[number % len(_COLORS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _LINES[number % len(_LINES)],
        "markersize": 4,
        "linewidth": 1.5,
    }


def _draw_loss(ax: Axes, losses: pd.DataFrame, optimizers: list[str]) -> None:
    """Losses of the probe set as lines; those of the training batches pale behind them."""
    ends: list[float] = []
    for place, name in enumerate(optimizers):
        of = losses[losses["optimizer"] == name].sort_values("step")
        ends += of["value"].tolist()
        probe, train = (of[of["metric"] == metric] for metric in ("probe_loss", "train_loss"))
        pale = {"color": _style(place)["color"], "linewidth": 0.8, "alpha": 0.35}
        ax.plot(train["step"].to_numpy(), train["value"].to_numpy(), **pale)
        line = probe if len(probe) else train
        ax.plot(line["step"].to_numpy(), line["value"].to_numpy(), label=name, **_style(place))
    if min(ends) > 0 and max(ends) / min(ends) > _LOG_LOSS:
        ax.set_yscale("log")
    ax.set_title("loss (pale: training batches)", fontsize=9, loc="left")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=TICKS))


def _draw_cosines(ax: Axes, live: pd.DataFrame, optimizers: list[str], low: float) -> None:
    for place, name in enumerate(optimizers):
        of = live[live["optimizer"] == name].groupby("step")["value"]
        mean, worst, best = of.mean(), of.min(), of.max()
        steps = mean.index.to_numpy()
        if (best > worst).any():
            shade = {"color": _style(place)["color"], "alpha": 0.12, "lw": 0}
            ax.fill_between(steps, worst.to_numpy(), best.to_numpy(), **shade)
        ax.plot(steps, mean.to_numpy(), label=name, **_style(place))
    ax.set_ylim(low, 1.02)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=TICKS))
