"""The rows of a quality table, and the table that they make."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import pandas as pd

from kronecker_probe.gradients.samples.base import GradientSamples
from kronecker_probe.quality.estimates.estimate import Estimate
from kronecker_probe.quality.metrics.catalog import SQUARED

COLUMNS = (
    "parameter", "m", "n", "n_examples", "n_columns", "n_positions", "target", "approximation",
    "metric", "index", "kind", "value", "stderr", "low", "high", "n_eff", "note",
)  # fmt: skip

_DTYPES: dict[str, Any] = {
    **dict.fromkeys(("m", "n", "n_examples", "n_columns", "n_positions", "index"), "Int64"),
    **dict.fromkeys(("value", "stderr", "low", "high", "n_eff"), "float64"),
    "step": "int64",
}

Row: TypeAlias = dict[str, Any]


def to_table(rows: Sequence[Row], leading: Sequence[str] = ()) -> pd.DataFrame:
    """Rows as a table with all columns, nullable integers and strings."""
    columns = {}
    for name in (*leading, *COLUMNS):
        values = [row.get(name) for row in rows]
        columns[name] = pd.array(values, dtype=_DTYPES.get(name, "string"))
    return pd.DataFrame(columns, columns=[*leading, *COLUMNS])


def estimate_row(estimate: Estimate) -> Row:
    """An estimate as a row; errors, estimated as squares, show their roots.

    A plug-in number has no error bar, and that of an error is an interval only.
    """
    row: Row = {
        "approximation": estimate.approximation, "metric": estimate.metric,
        "kind": estimate.kind, "value": estimate.display, "n_eff": estimate.n_eff,
        "note": estimate.note or None,
    }  # fmt: skip
    if math.isnan(estimate.value) or estimate.kind == "plugin":
        return row
    row["low"], row["high"] = estimate.display_interval()
    if estimate.metric not in SQUARED:
        row["stderr"] = estimate.stderr
    elif estimate.value < 0 and not estimate.note:
        row["note"] = f"the squared error is {estimate.value:.2g} ± {estimate.stderr:.2g}"
    return row


def undefined_rows(
    approximation: str, metrics: Sequence[str], kinds: Sequence[str], reason: str
) -> list[Row]:
    """Rows without a value: an approximation that the samples cannot carry."""
    return [
        {"approximation": approximation, "metric": metric, "kind": kind, "value": math.nan,
         "note": reason}
        for metric in metrics
        for kind in kinds
    ]  # fmt: skip


def skipped_row(parameter: str, reason: str) -> Row:
    """The row of a parameter that was not measured."""
    return {"parameter": parameter, "metric": "skipped", "value": math.nan, "note": reason}


def absent_row(parameter: str, approximation: str, reason: str) -> Row:
    """The row of an approximation that could not be scored."""
    return {
        "parameter": parameter, "approximation": approximation, "metric": "cosine",
        "kind": "plugin", "value": math.nan, "note": reason,
    }  # fmt: skip


def description(parameter: str, samples: GradientSamples, draws: str | None, note: str) -> Row:
    """What all rows of one set of samples say."""
    m, n = samples.shape
    return {
        "parameter": parameter, "m": m, "n": n, "n_examples": samples.n_examples,
        "n_columns": samples.n_columns, "n_positions": samples.n_positions, "target": draws,
        "note": note or None,
    }  # fmt: skip


def joined(shared: Row, rows: Iterable[Row]) -> list[Row]:
    """Each row with what all say; an own note goes before the shared one."""
    return [
        shared | {key: value for key, value in row.items() if key != "note" or value is not None}
        for row in rows
    ]
