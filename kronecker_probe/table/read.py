"""Reading a measurement table: names, wide forms and steps; pure functions of the table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from kronecker_probe.errors import InvalidInputError, unknown_name
from kronecker_probe.table.codes import Interval
from kronecker_probe.table.labels import LABELS
from kronecker_probe.table.metric_info import METRIC_INFO

# Share of a target's energy that truncation may drop without a word.
NEGLIGIBLE = 1e-3
# kinds of estimate, the one to show first, with their names in sentences
KIND_NAMES = {"population": "population", "held-out": "held-out", "plugin": "plug-in"}
PLUGIN = "plug-in numbers, of the sample matrix itself"  # a remark in titles
ABSTAINING = "plug-in numbers: the estimates abstain"  # another
NUMBERS = ("value", "stderr", "low", "high")  # the columns of a number and its error
_NOTHING = 1e-12  # rounding of double precision, summed over a layer


def label(approximation: str) -> str:
    """The name of an approximation as figures and sentences print it, its options behind it."""
    if approximation in LABELS:
        return LABELS[approximation]
    name, _, options = approximation.partition(":")
    return f"{LABELS.get(name, name)}, {options.replace(',', ', ')}" if options else name


def short(approximation: str) -> str:
    """The name of an approximation where there is little room: without the remark in brackets."""
    return label(approximation).split(" (")[0]


def ordered(approximations: Iterable[str]) -> list[str]:
    """Approximations in the order of :data:`LABELS`, unknown ones last, by name.

    One with options stands behind its name without them.
    """
    rank = {name: number for number, name in enumerate(LABELS)}

    def place(name: str) -> tuple[int, str]:
        known = name if name in rank else name.partition(":")[0]
        return rank.get(known, len(rank)), name

    return sorted(set(approximations), key=place)


def check_metric(metric: str, table: pd.DataFrame) -> None:
    """Raises UnknownNameError unless the metric is known or measured in ``table``."""
    if metric not in METRIC_INFO:
        scored = table.loc[table["approximation"].notna(), "metric"].unique()
        if metric not in scored:
            raise unknown_name("metric", metric, {*METRIC_INFO, *scored})


def scores(table: pd.DataFrame, metric: str = "cosine", column: str = "value") -> pd.DataFrame:
    """One metric in wide form: a row per (step, parameter), a column per approximation.

    Rows keep the table's order of parameters within a step. A table without a ``step`` column
    (one shot) gets step 0. Each parameter is shown in one kind (:func:`kinds`).

    Args:
        table: a measurement table.
        metric: as the table names it, with its options.
        column: "value", or "stderr", "low" or "high" of the same numbers; NaN where the table
            has no such column.

    Raises:
        UnknownNameError: ``metric`` is neither known nor in the table.
        InvalidInputError: the table holds two values for one step, parameter and approximation.
    """
    check_metric(metric, table)
    chosen = of_best_kind(table, metric)
    if "step" not in chosen:
        chosen = chosen.assign(step=0)
    if column not in chosen:
        chosen = chosen.assign(**{column: math.nan})
    key = ["step", "parameter", "approximation"]
    twice = chosen[chosen.duplicated(key)]
    if len(twice):
        where = ", ".join(f"{name} {twice.iloc[0][name]}" for name in key)
        raise InvalidInputError(
            f"The table holds several values of {metric!r} for {where}; "
            "filter it, for example by its draws or kind column."
        )
    wide = chosen.set_index(key)[column].unstack("approximation").astype("float64")
    order = {name: number for number, name in enumerate(chosen["parameter"].unique())}
    ranks = [(step, order[parameter]) for step, parameter in wide.index]
    return wide.iloc[sorted(range(len(ranks)), key=ranks.__getitem__)][ordered(wide.columns)]


def kinds(table: pd.DataFrame, metric: str = "cosine") -> dict[str, str]:
    """The kind of estimate to show of each parameter, at all of its steps: "" if there is one.

    "population" (or "held-out" in a table without) where each number that is defined for the
    sample has that estimate; "plugin" where some abstain, because numbers of different kinds are
    not comparable.
    """
    rows = _scored(table, metric)
    names = [str(name) for name in rows["parameter"].unique()]
    best = _best_kind(rows)
    if not best:
        return dict.fromkeys(names, "")
    sampled = set(rows.loc[(rows["kind"] == "plugin") & rows["value"].notna(), "parameter"])
    abstained = set(_abstained(rows, best).get_level_values("parameter"))
    return {name: "plugin" if name in sampled and name in abstained else best for name in names}


def _scored(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    return table[(table["metric"] == metric) & table["approximation"].notna()]


def _best_kind(rows: pd.DataFrame) -> str:
    """The first of the kinds that have values, "" where only one could be shown anyway."""
    if "kind" not in rows:
        return ""
    there = set(rows.loc[rows["value"].notna(), "kind"].dropna())
    return next((kind for kind in KIND_NAMES if kind in there and kind != "plugin"), "")


def _abstained(rows: pd.DataFrame, kind: str) -> pd.Index[Any]:
    """Places that have a number for the sample and none of ``kind``."""
    key = [name for name in ("step", "parameter", "approximation") if name in rows]
    defined = rows[rows["value"].notna()]
    sample, estimate = (
        defined[defined["kind"] == one].set_index(key).index for one in ("plugin", kind)
    )
    return sample.difference(estimate, sort=False)


def abstentions(table: pd.DataFrame, metric: str = "cosine") -> dict[str, str]:
    """Why a parameter is shown in plug-in numbers where others have estimates, with the steps.

    Returns:
        parameter -> "plug-in: estimates abstain at step 0"; none for a table of one kind.
    """
    rows = _scored(table, metric)
    chosen = kinds(table, metric)
    best = _best_kind(rows)
    told = {}
    for name in [name for name, kind in chosen.items() if kind == "plugin"]:
        of = rows[rows["parameter"] == name]
        when = ""
        if "step" in of:
            steps = set(_abstained(of, best).get_level_values("step"))
            when = f" at {steps_told(steps, of['step'].unique())}"
        told[name] = f"plug-in: estimates abstain{when}"
    return told


def steps_told(steps: Iterable[int], probed: Iterable[int]) -> str:
    """Some of the probed steps in words: "step 4", "steps 0 and 4", "steps 0 to 40", "every step".

    "to" stands between neighbours among the probed steps only; scattered steps are counted
    beyond three.
    """
    found, every = sorted({int(s) for s in steps}), sorted({int(s) for s in probed})
    if len(found) == 1:
        return f"step {found[0]}"
    if found == every:
        return "every step"
    first = every.index(found[0])
    if len(found) > 2 and every[first : first + len(found)] == found:
        return f"steps {found[0]} to {found[-1]}"
    if len(found) <= 3:
        return f"steps {', '.join(map(str, found[:-1]))} and {found[-1]}"
    return f"{len(found)} of {len(every)} steps, {found[0]} to {found[-1]}"


def of_best_kind(table: pd.DataFrame, metric: str = "cosine") -> pd.DataFrame:
    """The rows of one metric with the kind that :func:`kinds` chooses for their parameter."""
    wanted = kinds(table, metric)
    rows = _scored(table, metric)
    if "kind" not in rows:
        return rows
    chosen = rows["parameter"].map(wanted)
    # in a table of plug-in numbers, what has no estimates at all ("in-use" before the first
    # refresh) keeps its note, and so do estimates that all abstain beside no plug-in number
    sample = rows["kind"].isin(["plugin"]) | rows["kind"].isna()
    plain = sample if sample.any() else rows["kind"] == rows["kind"].min()
    return rows[((chosen == "") & plain) | (rows["kind"] == chosen)]


def kind_remark(table: pd.DataFrame, metric: str = "cosine") -> str:
    """Which kind of numbers :func:`scores` shows, in words; "" for a table of one kind."""
    found = kinds(table, metric)
    plugin = [name for name, kind in found.items() if kind == "plugin"]
    estimated = [kind for kind in found.values() if kind not in ("", "plugin")]
    if not estimated:
        rows = _scored(table, metric)
        told = "kind" in rows and rows["kind"].isin(["population", "held-out"]).any()
        return ABSTAINING if found and told else ""
    if plugin:
        few = ", ".join(plugin) if len(plugin) <= 3 else f"{len(plugin)} layers"
        return f"{estimated[0]} estimates, but plug-in numbers in {few}"
    return f"{estimated[0]} estimates"


def truncation_remark(table: pd.DataFrame) -> str:
    """What truncation left out of the targets, in words; "" where it was next to nothing."""
    dropped = table.loc[table["metric"] == "dropped_energy", "value"].max()
    if not dropped > NEGLIGIBLE:
        return ""
    return f"of targets truncated by up to {100 * dropped:.2g}% of their energy"


def number(value: float, places: int = 3) -> str:
    """Fixed decimals in the range where they tell something, else three digits.

    What is below any rounding of these numbers is 0, whatever its sign.
    """
    if abs(value) < _NOTHING:
        value = 0.0
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.{places}f}"
    return f"{value:.3g}"


def error_told(stderr: float) -> str:
    """Three decimals, or the first digit of what they would hide; rounding is no error."""
    return f"{stderr:.3f}" if stderr < 1e-9 or 5e-4 <= stderr < 1e4 else f"{stderr:.1g}"


def number_told(value: float, stderr: float, low: float, high: float, bracket: bool) -> str:
    """A number with what is known of its error.

    Returns:
        "0.912 ± 0.008" with a standard error, "0.412 [0.380, 0.441]" with an interval only,
        "0.412 (bracket 0.380 to 0.441)" for a bracket, "0.9123" for a number of the sample.
    """
    if not math.isnan(stderr):
        return f"{number(value)} ± {error_told(stderr)}"
    if math.isnan(low) or math.isnan(high):
        return number(value, 4)
    if bracket:
        return f"{number(value)} (bracket {number(low)} to {number(high)})"
    return f"{number(value)} [{number(low)}, {number(high)}]"


def row_told(row: Mapping[Any, Any]) -> str:
    """:func:`number_told` of one row of a table; "-" for what is undefined."""
    value, stderr, low, high = number_of(row)
    if math.isnan(value):
        return "-"
    return number_told(value, stderr, low, high, is_bracket(row))


def number_of(row: Mapping[Any, Any]) -> tuple[float, float, float, float]:
    """Value, stderr, low and high of one row of a table.

    A plug-in number is that of the sample matrix: what a metric says of its own numerical error
    (the quadrature of a divergence, the gradients of a direction) is no error of the data.
    """
    value, stderr, low, high = (as_float(row.get(key)) for key in NUMBERS)
    if as_text(row.get("kind")) == "plugin":
        return value, math.nan, math.nan, math.nan
    return value, stderr, low, high


def as_text(value: Any) -> str:
    """A cell of a table as text: "" where it is missing."""
    return "" if value is None or pd.isna(value) else str(value)


def vectors(table: pd.DataFrame) -> list[str]:
    """The measured parameters with one row or column, whose H one Kronecker product is itself."""
    if not {"m", "n", "approximation"} <= set(table):
        return []
    rows = table[table["approximation"].notna() & table["m"].notna() & table["n"].notna()]
    narrow = rows[(rows["m"] == 1) | (rows["n"] == 1)]
    return [str(name) for name in narrow["parameter"].unique()]


def matrices(table: pd.DataFrame) -> pd.DataFrame:
    """The table without its :func:`vectors`; all of it where there is nothing else."""
    left_out = vectors(table)
    measured = table.loc[table["approximation"].notna(), "parameter"].nunique()
    if len(left_out) == measured:
        return table
    return table[~table["parameter"].isin(left_out).fillna(False).astype(bool)]


def vectors_told(table: pd.DataFrame) -> str:
    """What :func:`matrices` leaves out, in words; "" for nothing."""
    left_out = vectors(table)
    measured = table.loc[table["approximation"].notna(), "parameter"].nunique()
    if not left_out or len(left_out) == measured:
        return ""
    count = f"{len(left_out)} vector{'s' * (len(left_out) > 1)}"
    return f"{count} left out, where the optimal Kronecker product is H"


def is_bracket(row: Mapping[Any, Any]) -> bool:
    """Whether a row of a table is a bracket: between held-out and in-sample numbers."""
    kind = row.get("interval")
    return isinstance(kind, str) and kind == Interval.BRACKET


def as_float(value: Any) -> float:
    """A cell of a table as a float: NaN where it is missing."""
    return math.nan if value is None or pd.isna(value) else float(value)


def last_step(table: pd.DataFrame) -> int | None:
    """The last step with quality numbers; None for a table without steps."""
    if "step" not in table:
        return None
    measured = table.loc[table["approximation"].notna(), "step"]
    return int(measured.max()) if len(measured) else None


def at_step(table: pd.DataFrame, step: int | None) -> pd.DataFrame:
    """The rows of one probed step, by default the last; all rows of a table without steps.

    Raises:
        InvalidInputError: ``step`` was not probed; names the nearest one.
    """
    if "step" not in table:
        if step is not None:
            raise InvalidInputError(
                f"step={step}, but the table has no 'step' column; leave it out."
            )
        return table
    chosen = last_step(table) if step is None else step
    probed = table.loc[table["parameter"].notna(), "step"].unique()
    if step is not None and step not in probed:
        near = min(probed, key=lambda other: abs(other - step)) if len(probed) else "none"
        raise InvalidInputError(f"Step {step} was not probed; the nearest probed step is {near}.")
    return table[table["step"] == chosen]


def first_shares(table: pd.DataFrame) -> dict[str, float]:
    """sigma_1 / ||H|| of each parameter: the cosine of the optimal Kronecker product.

    Args:
        table: rows of one step; parameters without a norm or singular values are left out, and
            so are those with H = 0.
    """
    about_target = table[table["parameter"].notna() & table["approximation"].isna()]
    first = about_target[
        (about_target["metric"] == "singular_value") & (about_target["index"] == 0)
    ]
    of_norm = about_target[about_target["metric"] == "norm"]
    if "kind" in of_norm:
        of_norm = of_norm[of_norm["kind"].fillna("plugin") == "plugin"]
    norms = of_norm.set_index("parameter")["value"]
    shares = first.set_index("parameter")["value"] / norms
    return {str(name): float(share) for name, share in shares.dropna().items()}


def shape(table: pd.DataFrame, name: str) -> str:
    """A parameter with its shape, "0.weight (64 × 128)"; the name alone without shapes."""
    rows = table[table["parameter"] == name]
    if "m" not in rows or rows["m"].dropna().empty or rows["n"].dropna().empty:
        return name
    return f"{name} ({rows['m'].dropna().iloc[0]} × {rows['n'].dropna().iloc[0]})"
