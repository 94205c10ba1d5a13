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
    "live": "live (held by the optimizer)",
}
METRICS = {
    "cosine": "cosine similarity to H",
    "relative_error": "relative error ‖H − P‖ / ‖H‖",
    "best_scale_error": "relative error at the best scale",
    "best_scale": "best scale c of c·P",
}


def label(approximation: str) -> str:
    """The name of an approximation as figures and sentences print it."""
    return LABELS.get(approximation, approximation)


def short(approximation: str) -> str:
    """The name of an approximation where there is little room: without the remark in brackets."""
    return label(approximation).split(" (")[0]


def ordered(approximations: Iterable[str]) -> list[str]:
    """Approximations in the order of :data:`LABELS`, unknown ones last, by name."""
    rank = {name: number for number, name in enumerate(LABELS)}
    return sorted(set(approximations), key=lambda name: (rank.get(name, len(rank)), name))


def check_metric(metric: str) -> None:
    """Raises UnknownNameError unless ``metric`` compares approximations."""
    if metric not in METRICS:
        raise unknown_name("metric", metric, METRICS)


def scores(table: pd.DataFrame, metric: str = "cosine") -> pd.DataFrame:
    """One metric in wide form: a row per (step, parameter), a column per approximation.

    Rows keep the table's order of parameters within a step. A table without a ``step`` column
    (one shot) gets step 0.

    Raises:
        UnknownNameError: ``metric`` is none of :data:`METRICS`.
        InvalidInputError: the table holds two values for one step, parameter and approximation.
    """
    check_metric(metric)
    chosen = table[(table["metric"] == metric) & table["approximation"].notna()]
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
    norms = about_target[about_target["metric"] == "norm"].set_index("parameter")["value"]
    shares = first.set_index("parameter")["value"] / norms
    return {str(name): float(share) for name, share in shares.dropna().items()}


def shape(table: pd.DataFrame, name: str) -> str:
    """A parameter with its shape, "0.weight (64 × 128)"; the name alone without shapes."""
    rows = table[table["parameter"] == name]
    if "m" not in rows or rows["m"].dropna().empty or rows["n"].dropna().empty:
        return name
    return f"{name} ({rows['m'].dropna().iloc[0]} × {rows['n'].dropna().iloc[0]})"
