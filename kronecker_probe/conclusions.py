"""What a measurement table says, in sentences; pure functions of the table.

Used for the titles of the figures, the report, and the end of a run on the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import pandas as pd

from kronecker_probe.tables import (
    METRICS,
    NUMBERS,
    as_float,
    error_told,
    first_shares,
    is_bracket,
    kind_remark,
    label,
    number_told,
    of_best_kind,
    scores,
    steps_told,
)

__all__ = [
    "Gap",
    "conclusions",
    "gaps",
    "headline",
    "spectrum_headline",
    "training_headline",
]

# Kronecker products without a fit: the ones that the optimum bounds and a reader chooses among
_CHOICES = ("shampoo-squared", "kfac", "shampoo")
# what is logged along a run, the most telling first
_LOSSES = {"train_loss": "training loss", "probe_loss": "loss on the probe set"}
_ACCURACIES = {
    "test_accuracy": "test accuracy",
    "probe_accuracy": "accuracy on the probe set",
    "train_accuracy": "training accuracy",
}
_EQUAL = 5e-4  # differences that three decimals do not show


@dataclass(frozen=True)
class Gap:
    """How far one approximation falls behind the optimal Kronecker product, at worst.

    Attributes:
        approximation: its name in the table.
        worst: the largest difference in cosine (or in an error) over the rows of the table. Of
            estimates it may be negative: an approximation whose number lies above the optimum's.
        stderr: its standard error, the larger one of the two numbers'; NaN without.
        estimated: whether it is a difference of estimates, which have an error, and not of
            numbers of the sample, which the optimum bounds.
        parameter: where it is largest.
        step: when it is largest; None for a table of one shot.
    """

    approximation: str
    worst: float
    stderr: float
    estimated: bool
    parameter: str
    step: int | None

    def __str__(self) -> str:
        """Three decimals, rounded up so that "within" is true, or with ± the error's own."""
        if math.isnan(self.stderr):
            return _within(self.worst)
        return f"{self.worst:.3f} ± {error_told(self.stderr)}"

    @property
    def indistinguishable(self) -> bool:
        """Whether an estimate lies at or above the optimum, which is possible by its error only."""
        return self.estimated and self.worst < _EQUAL

    @property
    def excuse(self) -> str:
        """How an estimate that is :attr:`indistinguishable` stands to the optimum."""
        if math.isnan(self.stderr):
            return "gap within error"
        if -self.worst <= 2 * self.stderr:
            return f"gap within its error of {error_told(self.stderr)}"
        return f"estimated {-self.worst:.3f} ± {error_told(self.stderr)} above it, which is noise"


def gaps(table: pd.DataFrame, metric: str = "cosine") -> list[Gap]:
    """Each Kronecker approximation's worst gap to the optimum, the smallest gap first.

    For the errors, the gap is the error in excess of the optimum's. Undefined values are left
    out; without an optimum there is no gap.
    """
    wide = scores(table, metric)
    if "optimal" not in wide:
        return []
    errors, lows = scores(table, metric, "stderr"), scores(table, metric, "low")
    found = []
    for name in _CHOICES:
        if name not in wide:
            continue
        gap = (wide["optimal"] - wide[name]) * (1 if metric == "cosine" else -1)
        if gap.notna().any():
            place: Any = gap.idxmax()  # (step, parameter)
            pair = ["optimal", name]
            # two cosines of one sample move together: the larger error bounds that of the gap
            stderr = float(errors.loc[place, pair].max(skipna=False))
            step = int(place[0]) if "step" in table else None
            estimated = bool(lows.loc[place, pair].notna().any())
            worst = float(gap.max())
            found.append(Gap(name, worst, stderr, estimated, str(place[1]), step))
    return sorted(found, key=lambda found_gap: found_gap.worst)


def headline(table: pd.DataFrame, metric: str = "cosine") -> str:
    """What to conclude from ``metric`` over all of the table: the title of its figures.

    It says which kind of estimate it is about, where the table holds several.
    """
    remark = kind_remark(table, metric)
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
    closest, farthest = ranking[0], ranking[-1]
    where = ""
    if layers.nunique() > 1:
        undefined = wide[[gap.approximation for gap in ranking]].isna().any(axis=None)
        where = " in every layer where it is defined" if undefined else " in every layer"
    verb = "stays" if steps.nunique() > 1 else "is"
    of = "the optimal Kronecker product" if metric == "cosine" else "the optimal product's error"
    within = f"{verb} within {closest} of {of}"
    if closest.indistinguishable:
        within = f"{verb} indistinguishable from {of} ({closest.excuse})"
    sentence = f"{label(closest.approximation)} {within}{where}"
    if farthest.worst > closest.worst + _EQUAL:
        place = [farthest.parameter] if layers.nunique() > 1 else []
        place += [f"step {farthest.step}"] if steps.nunique() > 1 else []
        far = f"{farthest.worst:.3f}" if math.isnan(farthest.stderr) else str(farthest)
        lag = f"up to {far} ({', '.join(place)})" if place else far
        sentence += f"; {label(farthest.approximation)} lags by {lag}"
    return sentence


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
        The sentences, in the table's order of parameters.
    """
    if table.empty:
        return []
    wide = scores(table)
    told = _told(table)
    return [
        _conclusion(table, told, pd.DataFrame(wide.xs(name, level="parameter")), str(name))
        for name in wide.index.get_level_values("parameter").unique()
    ]


_Told: TypeAlias = dict[tuple[int, str, str], str]  # (step, parameter, approximation) -> text


def _told(table: pd.DataFrame) -> _Told:
    """Every cosine that :func:`~kronecker_probe.tables.scores` shows, with its error."""
    texts = {}
    for row in of_best_kind(table).to_dict("records"):
        value, stderr, low, high = (as_float(row.get(key)) for key in NUMBERS)
        plain = math.isnan(stderr) and math.isnan(low)  # three decimals suffice in a sentence
        text = f"{value:.3f}" if plain else number_told(value, stderr, low, high, is_bracket(row))
        step = int(row["step"]) if "step" in row else 0
        texts[step, str(row["parameter"]), str(row["approximation"])] = text
    return texts


def _conclusion(table: pd.DataFrame, told: _Told, wide: pd.DataFrame, parameter: str) -> str:
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
    if "optimal" not in last:
        parts = [f"{label(name)} has cosine {text}" for name, text in texts.items()]
        clauses = [when + ", ".join(parts)]
    else:
        first = wide["optimal"].dropna()
        start = told[int(first.index[0]), parameter, "optimal"]
        trend = f"; {start} at step {first.index[0]}" if len(first) > 1 else ""
        rows = of_best_kind(table)  # of the whole table, so that no step has a kind of its own
        rows = rows[rows["parameter"] == parameter]
        now = rows[rows["step"] == step] if "step" in rows else rows
        clauses = [when + _ranking(gaps(now), f"cosine {texts['optimal']}{trend}")]
        if "eigen-corrected" in last:
            above = float(last["eigen-corrected"]) - float(last["optimal"])
            clear = above > max(_EQUAL, _uncertainty(table, parameter, step))
            beyond = ", beyond any Kronecker product" if clear else ""
            clauses.append(f"correcting the eigenvalues gives {texts['eigen-corrected']}{beyond}")
        if "live" in last:
            clauses.append(f"the optimizer's live preconditioner is at {texts['live']}")
    if undefined:
        clauses.append(f"{place} {why}")
    return f"{parameter}: {'; '.join(clauses)}."


def _ranking(ranked: list[Gap], reached: str) -> str:
    """The rules of one layer and step by their distance from the optimum."""
    best = "the best Kronecker product"
    if not ranked:
        return f"{best} has {reached}"
    closest, *others = ranked
    if closest.indistinguishable:
        sentence = f"{label(closest.approximation)} is indistinguishable from {best} "
        sentence += f"({closest.excuse}; {reached})"
    else:
        sentence = f"{label(closest.approximation)} comes within {closest} of {best} ({reached})"
    for gap in others:
        near = "indistinguishable too" if gap.indistinguishable else f"within {gap}"
        sentence += f", {label(gap.approximation)} {near}"
    return sentence


def spectrum_headline(table: pd.DataFrame) -> str:
    """The share of ||H||^2 in the first Kronecker singular value: the title of the spectra.

    Args:
        table: rows of one step.
    """
    shares = first_shares(table)
    if not shares:
        return "Kronecker singular values, relative to the largest"
    least = min(shares, key=lambda name: shares[name])
    energy = [f"{100 * share**2:.0f}%" for share in sorted(shares.values())]
    if len(shares) == 1:
        return f"One Kronecker product holds {energy[0]} of ‖H‖² in {least}"
    span = energy[0] if energy[0] == energy[-1] else f"{energy[0]} ({least}) to {energy[-1]}"
    return f"One Kronecker product holds {span} of ‖H‖², layer by layer"


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


def _uncertainty(table: pd.DataFrame, parameter: str, step: int) -> float:
    """Half the widest interval among the cosines of one parameter and step; 0 without any."""
    rows = of_best_kind(table)
    rows = rows[rows["parameter"] == parameter]
    rows = rows[rows["step"] == step] if "step" in rows else rows
    if not {"low", "high"} <= set(rows):
        return 0.0
    widths = (rows["high"] - rows["low"]).dropna()
    return float(widths.max()) / 2 if len(widths) else 0.0


def _why(table: pd.DataFrame, parameter: str, steps: list[int]) -> str:
    """The last note beside a cosine that is undefined at one of ``steps``, the optimum's first."""
    rows = table[(table["parameter"] == parameter) & (table["metric"] == "cosine")]
    if "step" in rows:
        rows = rows[rows["step"].isin(steps)]
    if "note" in rows:
        told = rows[rows["value"].isna() & rows["note"].notna()]
        preferred = told[told["approximation"] != "live"]
        for notes in (preferred["note"], told["note"]):
            if len(notes):
                return str(notes.iloc[-1])
    return "no reason noted"


def _within(gap: float) -> str:
    """Three decimals, rounded up, so that "within 0.012" is true."""
    return f"{max(math.ceil(gap * 1000 - 1e-6), 1) / 1000:.3f}"


def _span(values: pd.Series[Any]) -> str:
    low, high = f"{values.min():.3f}", f"{values.max():.3f}"
    return low if low == high else f"{low} to {high}"
