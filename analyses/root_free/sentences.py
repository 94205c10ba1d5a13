"""What the table of ``root_free`` lets conclude, in words."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from .batch import SCALINGS
from .methods import CNN, GPT, METHODS
from .precision import BEST, FULL, HALF, INVERSE_FREE, ROOTS
from .tables import (
    best_rates,
    by_precision,
    change_of,
    changes,
    curves,
    distances,
    final_losses,
    second_moments,
)

KEYS = ["method", "batch_size"]
BREAKS = 0.01  # above float32's loss


def sentences(table: pd.DataFrame) -> tuple[str, ...]:
    """Everything in one (the title), and then part by part."""
    return (
        f"{_best_losses(table)}. {_coordinates(table)}. {_batch_sizes(table)}. {_bfloat16(table)}",
        *(_losses(table, workload) for workload in (CNN, GPT)),
        _true_labels(table),
        _state(table),
        _roots(table),
    )


def _best_losses(table: pd.DataFrame) -> str:
    told = []
    for workload in (CNN, GPT):
        losses: Any = final_losses(table, workload)["median"]
        free, root = (
            min(losses[name] for name, method in METHODS.items() if method.root == takes)
            for takes in (False, True)
        )
        steps = curves(table).loc[workload].index.get_level_values("step").max()
        told.append(f"{free:.4g} against {root:.4g} after {steps:.0f} steps of {workload}")
    return f"Least losses without the root against those with it: {told[0]}, {told[1]}"


def _coordinates(table: pd.DataFrame) -> str:
    far: Any = distances(table)["median"].unstack("step").iloc[:, -1]
    exact = far[["RMSpropRootFree", "InverseFreeShampoo"]].max()
    rooted = far[["RMSprop", "Shampoo"]].min()
    return (
        f"Rescaled weights change root-free runs by {exact:.0e}, those with the root by "
        f"{rooted:.1f}"
    )


def _batch_sizes(table: pd.DataFrame) -> str:
    held: Any = second_moments(table).xs("sampled", level="labels").groupby(KEYS).median()
    one, other = (held.loc[name, "held"] for name in SCALINGS)
    size = held.index.unique("batch_size").max()
    return (
        f"With B the second moment is {one.min():.2f} to {one.max():.2f} of that of single "
        f"gradients up to B = {size:.0f}, without it down to {other.min():.4f}"
    )


def _bfloat16(table: pd.DataFrame) -> str:
    state = change_of(table, INVERSE_FREE, HALF, None).abs().max()
    plain, best = (breaking(table, how) for how in (HALF, BEST))
    where = "no run of Shampoo over 1%"
    if plain:
        where = f"Shampoo over 1%, or the run, at a damping of {_listed(plain)}"
    even = f", at {_listed(best)} even by their best iterates" if best else ""
    return (
        f"bfloat16 moves the loss of InverseFreeShampoo by {state:.2%} at most; inverse roots "
        f"computed in it cost {where}{even}"
    )


def breaking(table: pd.DataFrame, how: str) -> list[float]:
    """The dampings, descending, at which some run of Shampoo ends over 1% above float32's."""
    rows: Any = changes(table).xs(ROOTS, level="method")[how].groupby("damping").max()
    return sorted((float(damping) for damping, worst in rows.items() if worst > BREAKS))[::-1]


def _listed(dampings: list[float]) -> str:
    return ", ".join(f"{damping:.0e}" for damping in dampings)


def _losses(table: pd.DataFrame, workload: str) -> str:
    losses: Any = final_losses(table, workload)
    rates = best_rates(table, workload)
    told = "; ".join(
        f"{name} {losses.loc[name, 'median']:.4f} ({losses.loc[name, 'min']:.4f} to "
        f"{losses.loc[name, 'max']:.4f}) at lr {rates[name]:.2g}"
        for name in METHODS
    )
    return f"Final training losses on {workload}, median and range: {told}"


def _true_labels(table: pd.DataFrame) -> str:
    moments: Any = second_moments(table).xs("true", level="labels").groupby(KEYS).median()
    size = moments.index.unique("batch_size").max()
    held, theory = (moments.loc[(SCALINGS[0], size), name] for name in ("held", "theory"))
    return (
        "At true labels the mean gradient enters: with the factor B the second moment is "
        f"{held:.1f} times that of single gradients at B = {size:.0f}, {theory:.1f} by theory"
    )


def _state(table: pd.DataFrame) -> str:
    found = change_of(table, INVERSE_FREE, HALF, None)
    within = "within" if found.abs().max() <= BREAKS else "not within"
    return (
        f"With its whole state in bfloat16 InverseFreeShampoo ends at losses of pydoc-gpt that "
        f"differ from float32's by {_range(found)} in {len(found)} runs, {within} 1%"
    )


def _roots(table: pd.DataFrame) -> str:
    residuals: Any = 10.0 ** by_precision(table, "log10_residual")
    middle = residuals.groupby(["method", "damping"]).median()
    told = []
    for (method, damping), row in middle.sort_index(ascending=False).iterrows():
        told.append(
            f"{method} at {damping:.0e}: {_range(change_of(table, method, HALF, damping))}, by "
            f"the best iterate {_range(change_of(table, method, BEST, damping))}, residuals "
            f"{_size(row[FULL])}, {_size(row[HALF])} and {_size(row[BEST])}"
        )
    return (
        "Losses with inverse roots in bfloat16, over float32's at the same damping, and median "
        f"residuals in float32, in bfloat16 and of its best iterates: {'; '.join(told)}"
    )


def _size(residual: float) -> str:
    return f"{residual:.1e}" if residual < 1e3 else "above 1000"


def _range(relative: pd.Series) -> str:
    """Least and largest change in percent, or how many runs broke."""
    broken = int((relative == math.inf).sum())
    whole = relative[relative < math.inf]
    ends = list(dict.fromkeys(_percent(value) for value in (whole.min(), whole.max())))
    told = [" to ".join(ends)] if len(whole) else []
    told += [f"{broken} of {len(relative)} runs break"] if broken else []
    return " and ".join(told)


def _percent(change: float) -> str:
    return f"{round(change, 4) + 0.0:+.2%}"  # no -0.00%
