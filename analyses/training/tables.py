"""From losses to steps and seconds to a target, and what to conclude."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

NAME, REFERENCE = "training", "AdamW"

RATES = (1e-4, 1.0)  # the range of the search

SIGNIFICANT = 0.05


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row a workload and method: medians of all seeds, the range of the steps, and the settings.

    Ordered by workload, median steps, and final loss among those that do not reach the target.
    """
    keys = ["workload", "method"]
    wide = {
        name: table[table["measured"] == name].groupby(keys)["value"]
        for name in ("steps", "seconds", "final_loss", "step_seconds")
    }
    result = pd.DataFrame({name: group.median() for name, group in wide.items()})
    result["least"], result["most"] = wide["steps"].min(), wide["steps"].max()
    result["cosine"] = cosines(table).groupby(keys).median()
    final = table[table["measured"] == "final_loss"]
    result[["lr", "tuned", "setting"]] = final.groupby(keys)[["lr", "tuned", "setting"]].first()
    return result.sort_values(["workload", "steps", "final_loss"])


def cosines(table: pd.DataFrame) -> pd.Series:
    """What each method divides by, scored: a number a probed matrix, step and seed."""
    keys = ["workload", "method", "seed", "step", "parameter"]
    measured = np.where(table["method"] == "SGD", "cosine_identity", "cosine_in_use")
    return table[table["measured"] == measured].set_index(keys)["value"]


def correlation(over: pd.DataFrame, with_: str) -> tuple[float, float]:
    """Spearman's of the methods' cosines with another column, and its p; infinite values tie."""
    known = over.dropna(subset="cosine")
    found: Any = spearmanr(known["cosine"].rank(), known[with_].rank())
    return float(found.statistic), float(found.pvalue)


def sentences(table: pd.DataFrame) -> tuple[str, ...]:
    """What to conclude (the title), and for each workload the methods and the search."""
    over = summary(table)
    fastest = []
    for name, one in over.groupby(level="workload", sort=False):
        first, own = one.iloc[0], one.xs(REFERENCE, level="method").iloc[0]
        late = int(np.isinf(one["steps"]).sum())
        fastest.append(
            f"{name} {one.index[0][1]}, {first['steps']:.0f} steps and {first['seconds']:.2g} s "
            f"({REFERENCE}: {own['steps']:.0f} and {own['seconds']:.2g} s; {late} of {len(one)} "
            "methods never)"
        )
    title = (
        f"Fewest steps to {REFERENCE}'s final loss at equal tuning: {'; '.join(fastest)}. "
        f"{_verdict(over)}"
    )
    names = over.index.unique("workload")
    return (title, *(_of_methods(table, n) for n in names), *(_of_search(table, n) for n in names))


def _verdict(over: pd.DataFrame) -> str:
    told = []
    for name, one in over.groupby(level="workload", sort=False):
        r, p = correlation(one, "steps")
        speed = "no faster or slower" if p >= SIGNIFICANT else "faster" if r < 0 else "slower"
        told.append(f"{speed} training on {name} (rank correlation {r:+.2f}, p = {p:.2g})")
    return f"A P of higher cosine goes with {', with '.join(told)}"


def _of_methods(table: pd.DataFrame, name: str) -> str:
    over: Any = summary(table).loc[name]
    target = table.loc[(table["workload"] == name) & (table["measured"] == "target"), "value"]
    told = "; ".join(
        f"{method} {_steps(one)}, {one['seconds']:.2f} s, loss {one['final_loss']:.3g}, cosine "
        f"{one['cosine']:.2f}, at lr {one['lr']:.2g} and {one['tuned']} {one['setting']:.2g}"
        for method, one in over.iterrows()
    )
    r, p = correlation(over, "final_loss")
    return (
        f"{name}, target {target.iloc[0]:.3g}, median (range) of all seeds: {told}. Rank "
        f"correlation of cosine and final loss {r:+.2f} (p = {p:.2g})"
    ).replace("inf s", "- s")


def _steps(one: pd.Series) -> str:
    low, mid, high = (
        "not reached" if math.isinf(one[key]) else f"{one[key]:.0f}"
        for key in ("least", "steps", "most")
    )
    return f"{mid} ({low} to {high})" if low != high else mid


def _of_search(table: pd.DataFrame, name: str) -> str:
    rows = table[(table["workload"] == name) & (table["measured"] == "trial")]
    lost = np.isinf(rows["value"]).groupby(rows["method"], sort=False).sum()
    count = rows["trial"].nunique()
    broken = table[(table["workload"] == name) & (table["measured"] == "diverged")]
    edge = [str(m) for m, one in rows.groupby("method", sort=False) if _at_the_edge(one)]
    told = ", ".join(f"{method} {n}" for method, n in lost.items() if n) or "none"
    return (
        f"{name}: of {count} trials a method diverged {told}, of all {len(broken)} reported runs "
        f"{broken['value'].sum():.0f}; the lowest or highest rate was chosen for "
        f"{', '.join(edge) or 'none'}"
    )


def _at_the_edge(trials: pd.DataFrame) -> bool:
    best = trials.sort_values(["value", "lr"])["lr"].iloc[0]
    return bool(best in (trials["lr"].min(), trials["lr"].max()))
