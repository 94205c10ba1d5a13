"""The figure of what each variant gets wrong."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from kronecker_probe.plots.panels import GREY, Panels, Style, log_axis, name_axes

from .tables import (
    DRIFTS,
    FOLLOWERS,
    GRAFTED,
    LABELS,
    LOOKS,
    MAGNITUDES,
    RULES,
    SHOWN,
    drifted,
    expected_rms,
    renewals,
    sentences,
)


def draw(table: pd.DataFrame) -> Figure:
    """White noise, four panels of drift, three of rules."""
    figure = Figure()
    panels = Panels.make(8, None, figure, width=3.3, height=2.9)
    axes = panels.axes
    _draw_noise(axes[0], table[table["part"] == "magnitude"])
    for ax, measured in zip(axes[1:5], DRIFTS, strict=True):
        _draw_drift(ax, drifted(table, measured), measured)
    rules = renewals(table)
    for ax, measured in zip(axes[5:7], RULES, strict=True):
        _draw_rules(ax, rules, measured)
    _draw_factors(axes[7], table, rules)
    texts = [(ax.get_xlabel(), ax.get_ylabel()) for ax in axes]
    panels.finish(sentences(table)[0], "", "", legend=True)
    for ax, (x, y) in zip(axes, texts, strict=True):
        name_axes(ax, ax.get_title(loc="left"), x, y)
    return figure


def _draw_noise(ax: Axes, rows: pd.DataFrame) -> None:
    sizes = sorted((rows["m"] * rows["n"]).unique())
    lines = {"EShampoo": "1", "Shampoo": "$(mn)^{-1/4}$", "Shampoo², no trace": "$(mn)^{-1/2}$"}
    for variant, text in lines.items():
        theory = [expected_rms(variant, mn) for mn in sizes]
        ax.plot(sizes, theory, color=GREY, linewidth=1)
        ax.annotate(text, (sizes[-1], theory[-1]), (3, 9), textcoords="offset points",
                    ha="right", fontsize=8, color=GREY)  # fmt: skip
    for place, variant in enumerate(MAGNITUDES):
        found = rows[rows["variant"] == variant].groupby(["m", "n"])["value"].median()
        shift = 1.2 ** (place - 1 if place < 3 else 0)  # three of them lie on one line
        mn = [m * n * shift for m, n in found.index]
        _line(ax, mn, found, LOOKS[variant], variant, linestyle="")
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    ax.set_ylim(top=3)
    what = "white noise: theory (lines), measured"
    name_axes(ax, what, "mn, of m × n layers", "RMS of the update")


def _line(ax: Axes, x: Any, y: Any, look: Style, text: str, **more: Any) -> None:
    options = {"linestyle": look.line} | more
    ax.plot(x, y, color=look.color, marker=look.marker, markersize=5, label=text, **options)


def _draw_drift(ax: Axes, over: pd.DataFrame, measured: str) -> None:
    for variant in SHOWN.get(measured, tuple(FOLLOWERS)):
        look, one = LOOKS[variant], over.loc[variant]
        if variant in ("Shampoo", GRAFTED, "EShampoo"):
            ax.fill_between(one.index, one["min"], one["max"], color=look.color, alpha=0.12,
                            linewidth=0)  # fmt: skip
        _line(ax, one.index, one["median"], look, variant)
    ax.set_xscale("symlog", linthresh=1)
    ages = list(over.index.unique("age"))
    ax.set_xticks(ages, [f"{age:g}" for age in ages])
    ax.xaxis.set_minor_locator(NullLocator())
    if measured in ("eigenvalue_error", "length"):
        log_axis(ax.yaxis)
    title, label = DRIFTS[measured]
    name_axes(ax, title, "steps since the refresh", label)


def _draw_rules(ax: Axes, rules: Any, measured: str) -> None:
    for rule, (words, offset, turn) in LABELS.items():
        look = LOOKS[rule]
        over = rules.loc[rule].groupby("setting")[["refreshes", measured]]
        middle, low, high = over.median(), over.min(), over.max()
        ends = [middle[measured] - low[measured], high[measured] - middle[measured]]
        ax.errorbar(middle["refreshes"], middle[measured], ends, color=look.color, capsize=2,
                    marker=look.marker, markersize=5, linestyle="")  # fmt: skip
        align = ("left", "bottom") if turn else ("center", "top")
        for setting, one in middle.iterrows():
            ax.annotate(words.format(setting), (one["refreshes"], one[measured]), offset,
                        textcoords="offset points", fontsize=8, color=look.color, rotation=turn,
                        ha=align[0], va=align[1])  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.margins(0.25, 0.35)
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    title, label = RULES[measured]
    name_axes(ax, title, "refreshes, mean of the factors", label)


def _draw_factors(ax: Axes, table: pd.DataFrame, rules: Any) -> None:
    rows = table[(table["measured"] == "refreshes") & (table["variant"] == "tolerance")]
    keys = ["parameter", "side"]
    names = [f"{name} {'LR'[int(side)]}" for name, side in rows[keys].drop_duplicates().to_numpy()]
    colors = ("#0072b2", "#e69f00", "#cc79a7")
    for place, (setting, one) in enumerate(rules.loc["tolerance"].groupby("setting")):
        chosen = rows[(rows["setting"] == setting) & (rows["lr"] == one["lr"].iloc[0])]
        counts: Any = chosen.groupby(keys, sort=False)["value"].median()
        look = Style(colors[place % 3], "osD"[place % 3], "")
        _line(ax, counts, range(len(names)), look, f"τ = {setting:g}")
    ax.set_yticks(range(len(names)), names)
    ax.set_xlim(left=0)
    ax.margins(x=0.15, y=0.12)
    name_axes(ax, "each factor has its own frequency", "refreshes at tolerance τ", "")
