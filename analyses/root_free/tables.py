"""What the table of ``root_free`` says, part by part."""

from __future__ import annotations

from typing import Any

import pandas as pd

from .precision import FULL

ENDS = ["median", "min", "max"]


def curves(table: pd.DataFrame) -> pd.DataFrame:
    """Losses by workload, method and step: median, least and largest of the seeds."""
    rows = table[(table["part"] == "training") & (table["measured"] == "loss")]
    return rows.groupby(["workload", "method", "step"])["value"].agg(ENDS)


def final_losses(table: pd.DataFrame, workload: str) -> pd.DataFrame:
    """Those at the last step of a workload, by method."""
    losses: Any = curves(table).loc[workload]
    last: pd.DataFrame = losses.xs(losses.index.unique("step").max(), level="step")
    return last


def best_rates(table: pd.DataFrame, workload: str) -> dict[str, float]:
    """What the search found, by method."""
    rows = table[(table["part"] == "training") & (table["measured"] == "loss")]
    rows = rows[rows["workload"] == workload]
    return {str(name): float(lr) for name, lr in rows.groupby("method")["lr"].first().items()}


def second_moments(table: pd.DataFrame) -> pd.DataFrame:
    """Theory and what was held, over E[g_1^2]: a row for labels, scaling, batch size and seed."""
    rows = table[table["part"] == "batch"]
    keys = ["labels", "method", "batch_size", "seed", "measured"]
    return rows.set_index(keys)["value"].unstack("measured")


def distances(table: pd.DataFrame) -> pd.DataFrame:
    """Of reparameterized runs, by method and step: median, least and largest of the seeds."""
    rows = table[table["part"] == "invariance"]
    powers = rows.groupby(["method", "step"])["value"].agg(ENDS)
    return 10.0**powers


def by_precision(table: pd.DataFrame, measured: str) -> pd.DataFrame:
    """A row for method, damping (NaN for methods without roots) and seed; columns: precisions."""
    rows = table[(table["part"] == "precision") & (table["measured"] == measured)]
    keys = ["method", "damping", "seed", "precision"]
    return rows.set_index(keys)["value"].unstack("precision")


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """Losses of bfloat16 over those of float32, less 1; infinite for runs that broke."""
    losses = by_precision(table, "loss")
    return losses.drop(columns=FULL).div(losses[FULL], axis=0) - 1


def change_of(table: pd.DataFrame, method: str, how: str, damping: float | None) -> pd.Series:
    """``changes`` of one method, precision and damping, by seed."""
    rows: Any = changes(table).xs(method, level="method")[how].reset_index()
    if damping is not None:
        rows = rows[rows["damping"] == damping]
    found: pd.Series = rows.set_index("seed")[how]
    return found
