"""Reading a measurement table: names, wide forms and steps; pure functions of the table."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from kronecker_probe.errors import InvalidInputError, unknown_name

# in the order in which figures and tables list them
LABELS = {
    "optimal": "optimal Kronecker",
    "shampoo-squared": "Shampoo²",
    "kfac": "K-FAC",
    "shampoo": "Shampoo",
    "eigen-corrected": "eigenvalue-corrected",
    "diagonal": "diagonal",
    "shampoo-squared-sequential": "Shampoo², sequential",
    "kfac-reduce": "K-FAC reduce",
    "tkfac": "TKFAC",
    "ekfac": "EK-FAC",
    "divergence:q=0": "KL",
    "divergence:q=0.5": "SQ (q = 1/2)",
    "divergence": "divergence",
    "left-only": "left only",
    "right-only": "right only",
    "identity": "identity",
    "live": "live (held by the optimizer)",
}
METRICS = {
    "cosine": "cosine similarity to H",
    "relative_error": "relative error ‖H − P‖ / ‖H‖",
    "best_scale_error": "relative error at the best scale",
    "best_scale": "best scale c of c·P",
}


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


def check_metric(metric: str) -> None:
    """Raises UnknownNameError unless ``metric`` compares approximations."""
    if metric not in METRICS:
        raise unknown_name("metric", metric, METRICS)


def scores(table: pd.DataFrame, metric: str = "cosine") -> pd.DataFrame:
    """One metric in wide form: a row per (step, parameter), a column per approximation.

    Rows keep the table's order of parameters within a step. A table without a ``step`` column
    (one shot) gets step 0. Each parameter is shown in one kind (:func:`kinds`).

    Raises:
        UnknownNameError: ``metric`` is none of :data:`METRICS`.
        InvalidInputError: the table holds two values for one step, parameter and approximation.
    """
    chosen = of_best_kind(table, metric)
    if "step" not in chosen:
        chosen = chosen.assign(step=0)
    key = ["step", "parameter", "approximation"]
    twice = chosen[chosen.duplicated(key)]
    if len(twice):
        where = ", ".join(f"{name} {twice.iloc[0][name]}" for name in key)
        raise InvalidInputError(
            f"The table holds several values of {metric!r} for {where}; "
            "filter it, for example by its draws or kind column."
        )
    wide = chosen.set_index(key)["value"].unstack("approximation").astype("float64")
    order = {name: number for number, name in enumerate(chosen["parameter"].unique())}
    ranks = [(step, order[parameter]) for step, parameter in wide.index]
    return wide.iloc[sorted(range(len(ranks)), key=ranks.__getitem__)][ordered(wide.columns)]


def kinds(table: pd.DataFrame, metric: str = "cosine") -> dict[str, str]:
    """The kind of estimate to show of each parameter, at all of its steps: "" if there is one.

    "population" where each number that is defined for the sample has its population estimate;
    "plugin" where some abstain, because numbers of different kinds are not comparable.

    Raises:
        UnknownNameError: ``metric`` is none of :data:`METRICS`.
    """
    check_metric(metric)
    rows = table[(table["metric"] == metric) & table["approximation"].notna()]
    names = [str(name) for name in rows["parameter"].unique()]
    if "kind" not in rows or not (rows["kind"] == "population").any():
        return dict.fromkeys(names, "")
    key = [name for name in ("step", "parameter", "approximation") if name in rows]
    defined = rows[rows["value"].notna()]
    plugin = defined[defined["kind"] == "plugin"].set_index(key).index
    population = defined[defined["kind"] == "population"].set_index(key).index
    abstained = set(plugin.difference(population).get_level_values("parameter"))
    there = set(population.get_level_values("parameter"))
    return {
        name: "population" if name in there and name not in abstained else "plugin"
        for name in names
    }


def of_best_kind(table: pd.DataFrame, metric: str = "cosine") -> pd.DataFrame:
    """The rows of one metric with the kind that :func:`kinds` chooses for their parameter.

    Raises:
        UnknownNameError: ``metric`` is none of :data:`METRICS`.
    """
    wanted = kinds(table, metric)
    rows = table[(table["metric"] == metric) & table["approximation"].notna()]
    if "kind" not in rows:
        return rows
    rows = rows[~rows["kind"].isin(["held-out"])]
    chosen = rows["parameter"].map(wanted)
    # what has no estimates at all ("live" before the first refresh) keeps its note
    return rows[(chosen == "") | (rows["kind"] == chosen)]


def kind_remark(table: pd.DataFrame, metric: str = "cosine") -> str:
    """Which kind of numbers :func:`scores` shows, in words; "" for a table of one kind."""
    found = kinds(table, metric)
    plugin = [name for name, kind in found.items() if kind == "plugin"]
    if "population" not in found.values():
        return "plug-in numbers: population estimates abstain" if plugin else ""
    if plugin:
        few = ", ".join(plugin) if len(plugin) <= 3 else f"{len(plugin)} layers"
        return f"population estimates, but plug-in numbers in {few}"
    return "population estimates"


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
