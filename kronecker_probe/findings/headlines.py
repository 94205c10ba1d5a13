"""What a measurement table says, in sentences; pure functions of the table.

Used for the titles of the figures, the report, and the end of a run on the command line.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import pandas as pd

from kronecker_probe.table.numbers import Number, listed, numbers
from kronecker_probe.table.optimum_gaps import Gap, differences, gaps
from kronecker_probe.table.read import (
    ABSTAINING,
    METRICS,
    abstentions,
    first_shares,
    is_bracket,
    kind_remark,
    label,
    matrices,
    number_of,
    number_told,
    of_best_kind,
    scores,
    steps_told,
    truncation_remark,
    vectors_told,
)

__all__ = [
    "Gap",
    "conclusions",
    "gaps",
    "headline",
    "spectrum_headline",
    "training_headline",
]

# what is logged along a run, the most telling first
_LOSSES = {"train_loss": "training loss", "probe_loss": "loss on the probe set"}
_ACCURACIES = {
    "test_accuracy": "test accuracy",
    "probe_accuracy": "accuracy on the probe set",
    "train_accuracy": "training accuracy",
}
UNKNOWN = "cannot be told from this sample"
# From this much of a cosine on, a preconditioner is far below the best product.
FAR = 0.05
_EQUAL = 5e-4  # differences that three decimals do not show


def headline(table: pd.DataFrame, metric: str = "cosine") -> str:
    """What to conclude from ``metric`` over all of the table: the title of its figures.

    It says which kind of estimate it is about, where the table holds several.
    """
    table = matrices(table)
    remarks = (kind_remark(table, metric), truncation_remark(table))
    remark = "; ".join(filter(None, remarks))
    return _headline(table, metric) + (f" ({remark})" if remark else "")


def _headline(table: pd.DataFrame, metric: str) -> str:
    wide = scores(table, metric)
    if wide.empty and table["approximation"].notna().any():
        return f"The {METRICS[metric]} was not measured"
    if not wide.notna().any(axis=None):
        return f"No {METRICS[metric]} is defined in this table; its notes say why"
    if metric == "best_scale":
        return _scale_headline(wide)
    ranking = gaps(table, metric)
    if not ranking:
        return _range_headline(wide, metric)
    steps, layers = (wide.index.get_level_values(level) for level in ("step", "parameter"))
    closest, count = ranking[0], layers.nunique()
    of = "the optimal Kronecker product" if metric == "cosine" else "the optimal product's error"
    if closest.known and (count == 1 or len(closest.unclear) < count):
        undefined = wide[[gap.approximation for gap in ranking]].isna().any(axis=None)
        verb = "stays" if steps.nunique() > 1 else "is"
        within = f"{verb} within {closest} of {of}"
        if closest.indistinguishable:
            within = f"{verb} indistinguishable from {of} (difference {closest})"
        sentence = f"{label(closest.approximation)} {within}"
        sentence += _where(closest, count, bool(undefined))
    elif closest.known:
        stays = "stays" if steps.nunique() > 1 else "is"
        sentence = (
            f"How far {label(closest.approximation)} {stays} from {of} {UNKNOWN} throughout the "
            f"run in any of {count} layers"
        )
    else:
        how_far, off = _unknown(ranking)
        sentence = f"{how_far[:1].upper()}{how_far[1:]} from {of} {UNKNOWN} ({off})"
    farthest = max((gap for gap in ranking if gap.known), key=lambda gap: gap.worst, default=None)
    if farthest and farthest.worst > closest.worst + _EQUAL and not farthest.indistinguishable:
        place = [farthest.parameter] if count > 1 else []
        place += [f"step {farthest.step}"] if steps.nunique() > 1 else []
        exact = farthest.difference.kind == "plugin"
        far = f"{farthest.worst:.3f}" if exact else str(farthest)
        lag = f"up to {far} ({', '.join(place)})" if place else far
        sentence += f"; {label(farthest.approximation)} lags by {lag}"
    return sentence


def _unknown(ranked: list[Gap]) -> tuple[str, str]:
    """Of the rules whose gaps the sample cannot tell: "how far K-FAC is", and their gaps."""
    lost = [gap for gap in ranked if not gap.known]
    names = listed(label(gap.approximation) for gap in lost)
    how_far = f"how far {names} {'are' if len(lost) > 1 else 'is'}"
    return how_far, f"difference {', '.join(str(gap.difference) for gap in lost)}"


def _where(gap: Gap, layers: int, undefined: bool) -> str:
    """In which layers a gap of a headline holds."""
    if gap.unclear:
        if layers == 1:
            return " where this sample can tell, which it cannot at every step"
        count = len(gap.unclear)
        names = f" ({', '.join(gap.unclear)})" if count <= 3 else ""
        return f" where this sample can tell, which it cannot in {count} of {layers} layers{names}"
    if layers == 1:
        return ""
    return " in every layer where it is defined" if undefined else " in every layer"


def _range_headline(wide: pd.DataFrame, metric: str) -> str:
    """For a table without an optimum, or with nothing beside it: the best mean and its range."""
    means = wide.mean()
    best = str(means.idxmax() if metric == "cosine" else means.idxmin())
    return f"The {METRICS[metric]} of the {label(best)} approximation is {_span(wide[best])}"


def _scale_headline(wide: pd.DataFrame) -> str:
    distance = (wide - 1).abs().max().dropna()
    worst = str(distance.idxmax())
    return (
        f"{label(worst)} is farthest from its best scale: c = {_span(wide[worst])}, "
        "where 1 needs no correction"
    )


def conclusions(table: pd.DataFrame) -> list[str]:
    """One sentence per measured parameter, about the last step with a defined cosine.

    Estimates are told with their standard error, or as a bracket where they are one.

    Args:
        table: a measurement table; ``step`` may be missing (one shot), and any of the
            approximations; undefined values (NaN) are told as such.

    Returns:
        The sentences, in the table's order of parameters; vectors, of which there is nothing to
        say, are counted in a last one.
    """
    if table.empty:
        return []
    remark = vectors_told(table)
    table = matrices(table)
    wide = scores(table)
    told = _told(table)
    chosen = of_best_kind(table)  # of the whole table, so that no step has a kind of its own
    plugin = {str(name) for name in chosen["parameter"].unique()}
    plugin &= plugin if kind_remark(table) == ABSTAINING else set(abstentions(table))
    by_layer = dict(iter(chosen.groupby("parameter", sort=False)))
    sentences = [
        _conclusion(
            table,
            told,
            by_layer.get(name, chosen[:0]),
            str(name) in plugin,
            pd.DataFrame(wide.xs(name, level="parameter")),
            str(name),
        )
        for name in wide.index.get_level_values("parameter").unique()
    ]
    return sentences + ([f"{remark}."] if remark else [])


_Told: TypeAlias = dict[tuple[int, str, str], str]  # (step, parameter, approximation) -> text


def _told(table: pd.DataFrame) -> _Told:
    """Every cosine that :func:`~kronecker_probe.table.read.scores` shows, with its error."""
    texts = {}
    for row in of_best_kind(table).to_dict("records"):
        value, stderr, low, high = number_of(row)
        plain = math.isnan(stderr) and math.isnan(low)  # three decimals suffice in a sentence
        text = f"{value:.3f}" if plain else number_told(value, stderr, low, high, is_bracket(row))
        step = int(row["step"]) if "step" in row else 0
        texts[step, str(row["parameter"]), str(row["approximation"])] = text
    return texts


def _conclusion(
    table: pd.DataFrame,
    told: _Told,
    rows: pd.DataFrame,
    plugin: bool,
    wide: pd.DataFrame,
    parameter: str,
) -> str:
    """The sentence about one parameter; ``wide`` has a row per step."""
    defined = wide.notna().any(axis=1)
    undefined = [int(step) for step in wide.index[~defined]]
    why = f"every cosine is undefined ({_why(table, parameter, undefined)})"
    place = f"at {steps_told(undefined, wide.index)}" if undefined and "step" in table else ""
    if not defined.any():
        return f"{parameter}: {place}{' ' if place else ''}{why}."
    step = int(wide.index[defined.to_numpy()][-1])
    last = wide[defined.to_numpy()].iloc[-1].dropna()
    texts = {str(name): told[step, parameter, str(name)] for name in last.index}
    when = f"at step {step} " if "step" in table else ""
    if plugin:
        when += "in plug-in numbers, as the estimates abstain, "
    if "optimal" not in last:
        parts = [f"{label(name)} has cosine {text}" for name, text in texts.items()]
        clauses = [when + ", ".join(parts)]
    else:
        first = wide["optimal"].dropna()
        start = told[int(first.index[0]), parameter, "optimal"]
        trend = f"; {start} at step {first.index[0]}" if len(first) > 1 else ""
        now = rows[rows["step"] == step] if "step" in rows else rows
        clauses = [when + _ranking(gaps(now), f"cosine {texts['optimal']}{trend}")]
        if "eigen-corrected" in last:
            (above,) = differences(now, "eigen-corrected", "optimal").values()
            beyond = ", beyond any Kronecker product" if above.low > _EQUAL else ""
            clauses.append(f"correcting the eigenvalues gives {texts['eigen-corrected']}{beyond}")
        if "in-use" in last:
            held = f"the optimizer's live preconditioner is at {texts['in-use']}"
            (below,) = differences(now, "optimal", "in-use").values()
            clauses.append(f"{held}, far below the best product" if below.low > FAR else held)
    if undefined:
        clauses.append(f"{place} {why}")
    if truncated := truncation_remark(table[table["parameter"] == parameter]):
        clauses.append(f"all {truncated}, which makes cosines too high")
    return f"{parameter}: {'; '.join(clauses)}."


def _ranking(ranked: list[Gap], reached: str) -> str:
    """The rules of one layer and step by their distance from the optimum."""
    best = "the best Kronecker product"
    if not ranked:
        return f"{best} has {reached}"
    closest, *others = ranked
    how_far, off = _unknown(ranked) if not all(gap.known for gap in ranked) else ("", "")
    if not closest.known:
        sentence = f"{how_far} from {best} {UNKNOWN} ({off}; {reached})"
    elif closest.indistinguishable:
        sentence = f"{label(closest.approximation)} is indistinguishable from {best} "
        sentence += f"(difference {closest}; {reached})"
    else:
        sentence = f"{label(closest.approximation)} comes within {closest} of {best} ({reached})"
    for gap in (gap for gap in others if gap.known):
        near = "indistinguishable too" if gap.indistinguishable else f"within {gap}"
        sentence += f", {label(gap.approximation)} {near}"
    if how_far and closest.known:
        sentence += f"; {how_far} {UNKNOWN} ({off})"
    return sentence


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
    rows = table[(table["approximation"] == "optimal") & table["parameter"].notna()]
    found = {
        str(name): numbers(pd.DataFrame(of), "cosine", math.inf).get("optimal")
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


def _why(table: pd.DataFrame, parameter: str, steps: list[int]) -> str:
    """The last note beside a cosine that is undefined at one of ``steps``, the optimum's first."""
    rows = table[(table["parameter"] == parameter) & (table["metric"] == "cosine")]
    if "step" in rows:
        rows = rows[rows["step"].isin(steps)]
    if "note" in rows:
        told = rows[rows["value"].isna() & rows["note"].notna()]
        preferred = told[told["approximation"] != "in-use"]
        for notes in (preferred["note"], told["note"]):
            if len(notes):
                return str(notes.iloc[-1])
    return "no reason noted"


def _span(values: pd.Series[Any]) -> str:
    low, high = f"{values.min():.3f}", f"{values.max():.3f}"
    return low if low == high else f"{low} to {high}"
