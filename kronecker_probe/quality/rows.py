"""The rows of a quality table, and the table that they make."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, cast

import pandas as pd

from kronecker_probe.gradients.samples.base import GradientSamples
from kronecker_probe.quality.estimates.estimate import Estimate
from kronecker_probe.quality.metrics.catalog import SQUARED
from kronecker_probe.table.codes import Interval, Reason, ReasonCode, code_of
from kronecker_probe.table.columns import DTYPES

Row: TypeAlias = dict[str, Any]


def to_table(rows: Sequence[Row], leading: Sequence[str] = ()) -> pd.DataFrame:
    """Rows as a measurement table, without a step unless ``leading`` has it.

    A value that is undefined always has a reason.
    """
    for row in rows:
        scored = row.get("approximation") is not None or row["metric"] == "skipped"
        if scored and row.get("reason") is None and math.isnan(row.get("value", math.nan)):
            row["reason"] = ReasonCode.UNDEFINED
    names = [*leading, *(name for name in DTYPES if name != "step")]
    columns = {
        name: pd.array([row.get(name) for row in rows], dtype=cast("Any", DTYPES[name]))
        for name in names
    }
    return pd.DataFrame(columns, columns=names)


def estimate_row(estimate: Estimate) -> Row:
    """An estimate as a row; errors, estimated as squares, show their roots.

    A plug-in number has no error bar, and that of an error is an interval only.
    """
    row: Row = {
        "approximation": estimate.approximation, "metric": estimate.metric,
        "kind": estimate.kind, "value": estimate.display, "n_eff": estimate.n_eff,
        "note": estimate.note or None, "copies": estimate.copies,
    }  # fmt: skip
    if math.isnan(estimate.value):
        return row | {"reason": code_of(estimate.note)}
    if estimate.kind == "plugin":
        return row
    row["low"], row["high"] = estimate.display_interval()
    row["interval"] = Interval.BRACKET if estimate.bracket else Interval.CONFIDENCE
    if estimate.metric in SQUARED and not estimate.bracket:
        row["interval"] = Interval.ROOT
    if estimate.metric not in SQUARED:
        row["stderr"] = estimate.stderr
    elif estimate.value < 0 and not estimate.note:
        row["note"] = f"the squared error is {estimate.value:.2g} ± {estimate.stderr:.2g}"
    return row


def undefined_rows(
    approximation: str, metrics: Sequence[str], kinds: Sequence[str], reason: Reason
) -> list[Row]:
    """Rows without a value: an approximation that the samples cannot carry."""
    return [
        {"approximation": approximation, "metric": metric, "kind": kind, "value": math.nan,
         "reason": reason.code, "note": reason}
        for metric in metrics
        for kind in kinds
    ]  # fmt: skip


def skipped_row(parameter: str, reason: str) -> Row:
    """The row of a parameter that was not measured."""
    code = getattr(reason, "code", ReasonCode.NOT_MEASURABLE)
    return {
        "parameter": parameter, "metric": "skipped", "value": math.nan, "reason": code,
        "note": reason,
    }  # fmt: skip


def absent_row(parameter: str, approximation: str, reason: str) -> Row:
    """The row of an optimizer's operator that is not there, with the reason for people."""
    return {
        "parameter": parameter, "approximation": approximation, "metric": "cosine",
        "kind": "plugin", "value": math.nan, "reason": ReasonCode.NO_PRECONDITIONER, "note": reason,
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
