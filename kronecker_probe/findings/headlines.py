"""Titles of figures: what the drawn numbers say, over all layers and steps, in one line.

A title is about the numbers that are drawn, of one kind of estimate. It claims a distance only
where the same gate as in ``diagnose`` lets it: where the difference is known beyond its error.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from kronecker_probe.table.metric_info import metric_info
from kronecker_probe.table.numbers import Number, listed, numbers
from kronecker_probe.table.optimum_gaps import Gap, gaps
from kronecker_probe.table.read import (
    first_shares,
    kind_remark,
    label,
    matrices,
    scores,
    truncation_remark,
)

# What is logged along a run: the first of each that was logged is in the title.
_LOSSES = {"train_loss": "training loss", "probe_loss": "loss on the probe set"}
_ACCURACIES = {
    "test_accuracy": "test accuracy",
    "probe_accuracy": "accuracy on the probe set",
    "train_accuracy": "training accuracy",
}
UNKNOWN = "is too uncertain to judge"
_EQUAL = 5e-4  # differences that three decimals do not show


def headline(table: pd.DataFrame, metric: str = "cosine") -> str:
    """The title of figures of one metric, with the kind of estimate where there are several.

    Args:
        table: What is drawn.
        metric: Which of its metrics.
    """
    table = matrices(table)
    remarks = (kind_remark(table, metric), truncation_remark(table))
    remark = "; ".join(filter(None, remarks))
    return _headline(table, metric) + (f" ({remark})" if remark else "")


def _headline(table: pd.DataFrame, metric: str) -> str:
    wide = scores(table, metric)
    if wide.empty and table["approximation"].notna().any():
        return f"The {metric_info(metric).label} was not measured"
    if not wide.notna().any(axis=None):
        return f"No {metric_info(metric).label} is defined in this table, which holds the reasons"
    if metric == "best_scale":
        return _scale_headline(wide)
    ranking = gaps(table, metric) if metric_info(metric).bounded else []
    if not ranking:
        return _range_headline(wide, metric)
    of = "the optimum" if metric == "cosine" else "the optimum's error"
    steps, layers = (wide.index.unique(level).size for level in ("step", "parameter"))
    closest = ranking[0]
    undefined = wide[[gap.approximation for gap in ranking]].isna().any(axis=None)
    sentence = _closest(ranking, of, steps > 1, layers, bool(undefined))
    farthest = max((gap for gap in ranking if gap.known), key=lambda gap: gap.worst, default=None)
    if farthest and farthest.worst > closest.worst + _EQUAL and not farthest.indistinguishable:
        place = [farthest.parameter] if layers > 1 else []
        place += [f"step {farthest.step}"] if steps > 1 else []
        exact = farthest.difference.kind == "plugin"
        far = f"{farthest.worst:.3f}" if exact else str(farthest)
        sentence += f"; {label(farthest.approximation)} differs by "
        sentence += f"up to {far} ({', '.join(place)})" if place else far
    return sentence


def _closest(ranking: list[Gap], of: str, several: bool, layers: int, undefined: bool) -> str:
    """What is known of the closest rule."""
    closest, verb = ranking[0], "stays" if several else "is"
    name = label(closest.approximation)
    if not closest.known:
        lost = [gap for gap in ranking if not gap.known]
        names = listed(label(gap.approximation) for gap in lost)
        off = ", ".join(str(gap.difference) for gap in lost)
        are = "are" if len(lost) > 1 else "is"
        return f"How far {names} {are} from {of} {UNKNOWN} (difference {off})"
    if layers > 1 and len(closest.unclear) == layers:
        return f"How far {name} {verb} from {of} {UNKNOWN} at some steps of each of {layers} layers"
    near = f"within {closest} of {of}"
    if closest.indistinguishable:
        near = f"indistinguishable from {of} (difference {closest})"
    return f"{name} {verb} {near}{_where(closest, layers, undefined)}"


def _where(gap: Gap, layers: int, undefined: bool) -> str:
    """In which layers a gap of a headline holds."""
    if gap.unclear:
        if layers == 1:
            return " at the steps where it is certain enough to judge"
        count = len(gap.unclear)
        names = f" ({', '.join(gap.unclear)})" if count <= 3 else ""
        return f", but {count} of {layers} layers are too uncertain to judge{names}"
    if layers == 1:
        return ""
    return " in every layer where it is defined" if undefined else " in every layer"


def _range_headline(wide: pd.DataFrame, metric: str) -> str:
    """For a table without an optimum, or with nothing beside it: the best mean and its range."""
    means = wide.mean()
    best = str(means.idxmax() if metric_info(metric).better == "higher" else means.idxmin())
    return (
        f"The {metric_info(metric).label} of the {label(best)} approximation is {_span(wide[best])}"
    )


def _scale_headline(wide: pd.DataFrame) -> str:
    distance = (wide - 1).abs().max().dropna()
    worst = str(distance.idxmax())
    return (
        f"{label(worst)} is farthest from its best scale: c = {_span(wide[worst])}, "
        "where 1 needs no correction"
    )


def spectrum_headline(table: pd.DataFrame) -> str:
    """The share of ||H||^2 in the best Kronecker product: the title of the spectra.

    Of H itself where every layer has a population estimate of the optimum's cosine; otherwise of
    the sample matrix, whose spectrum is drawn.

    Args:
        table: rows of one step.
    """
    shares = first_shares(table)
    if not shares:
        return "Kronecker singular values, relative to the largest"
    estimated = population_optimum(table)
    if estimated.keys() >= shares.keys():
        said = {name: max(0.0, estimated[name].value) for name in shares}
        least = min(said, key=lambda name: said[name])
        whose, about = "‖H‖²", "an estimated "
    else:
        said, whose, about = shares, "the sample matrix's squared norm", ""
        least = min(said, key=lambda name: said[name])
    energy = [f"{100 * share**2:.0f}%" for share in sorted(said.values())]
    if len(said) == 1:
        sure = f" ({_squares(estimated[least])})" if about else ""
        return f"One Kronecker product holds {about}{energy[0]}{sure} of {whose} in {least}"
    span = energy[0] if energy[0] == energy[-1] else f"{energy[0]} ({least}) to {energy[-1]}"
    return f"One Kronecker product holds {about}{span} of {whose}, layer by layer"


def population_optimum(table: pd.DataFrame) -> dict[str, Number]:
    """The population cosine of the optimal product of each parameter that has one.

    Args:
        table: rows of one step.
    """
    rows = table[(table["approximation"] == "optimal") & (table["metric"] == "cosine")]
    found = {
        str(name): numbers(of.to_dict("records"), math.inf).get("optimal")
        for name, of in rows.groupby("parameter", sort=False)
    }
    return {name: one for name, one in found.items() if one and one.kind == "population"}


def _squares(cosine: Number) -> str:
    """The interval of a cosine's square, in percent."""
    low, high = (100 * min(1.0, max(0.0, end)) ** 2 for end in (cosine.low, cosine.high))
    return f"{low:.0f} to {high:.0f}%"


def training_headline(table: pd.DataFrame) -> str:
    """How the loss went, and the accuracy at the end: the title of the training figure."""
    clauses = []
    for metrics in (_LOSSES, _ACCURACIES):
        for metric, told in metrics.items():
            rows = table[(table["metric"] == metric) & table["value"].notna()]
            if len(rows):
                ends = rows.sort_values("step", kind="stable")[["step", "value"]].to_numpy()
                clauses.append(_course(told, ends[0].tolist(), ends[-1].tolist()))
                break
    title = "; ".join(clauses)
    return title[:1].upper() + title[1:]


def _course(what: str, first: list[float], last: list[float]) -> str:
    shown = "{:.1%}".format if "accuracy" in what else "{:.3g}".format
    if first[0] == last[0]:
        return f"{what} is {shown(last[1])} at step {last[0]:.0f}"
    if shown(first[1]) == shown(last[1]):
        return f"{what} is {shown(last[1])} at step {first[0]:.0f} and at step {last[0]:.0f}"
    verb = "rises" if last[1] > first[1] else "falls"
    return f"{what} {verb} from {shown(first[1])} to {shown(last[1])} by step {last[0]:.0f}"


def _span(values: pd.Series[Any]) -> str:
    low, high = f"{values.min():.3f}", f"{values.max():.3f}"
    return low if low == high else f"{low} to {high}"
