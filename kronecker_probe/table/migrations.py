"""Parts of older versions, brought to the present schema; the only code that reads notes.

=======  ==========================================================================================
version  what it is
=======  ==========================================================================================
0        version 0.1 of the package: no ``stderr``, ``low``, ``high`` and ``n_eff``
1        ``draws`` and ``n_data``; approximation ``live``, metrics ``live_*``; reasons in ``note``
2        ``target`` and ``n_examples``; ``in-use``, ``in_use_*``; codes in columns of their own
=======  ==========================================================================================

A part names its version since version 2; of older ones the columns tell it.
"""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import pyarrow as pa

from kronecker_probe.table.codes import Interval, ReasonCode

_ADDED_IN_1 = ("stderr", "low", "high", "n_eff")
_RENAMED_IN_2 = {"draws": "target", "n_data": "n_examples"}
_TYPES_OF_2 = {
    "interval": pa.string(), "copies": pa.int64(), "rule": pa.string(), "block_size": pa.int64(),
    "epsilon": pa.float64(), "reason": pa.string(),
}  # fmt: skip
# What a note of version 1 says, by the first pattern that it matches.
_REASONS = (
    (r"not selected by layers=", ReasonCode.NOT_SELECTED),
    (r"frozen|does not require", ReasonCode.FROZEN),
    (r"without a gradient|not (?:used|reached)|no gradient", ReasonCode.NO_GRADIENT),
    (r"K-FAC\S* needs", ReasonCode.NO_FACTORS),
    (r"under \d+ effective (?:data|draws)|N_eff", ReasonCode.FEW_EXAMPLES),
    (r"rests on .* effective", ReasonCode.WEAK_DIRECTION),
    (r"are not independent", ReasonCode.NOT_INDEPENDENT),
    (r"is not positive", ReasonCode.NOT_POSITIVE),
    (r"[KMGT]i?B\b|memory", ReasonCode.MEMORY),
    (r"\bH = 0|\bP = 0|is zero", ReasonCode.ZERO),
    (r"not finite|non-finite", ReasonCode.NOT_FINITE),
    (r"beyond what float64", ReasonCode.OUT_OF_RANGE),
    (r"did not converge", ReasonCode.NOT_CONVERGED),
    (r"it is within live_statistics", ReasonCode.IN_STATISTICS),
)


def migrated(table: pa.Table, version: str, newest: int) -> pa.Table:
    """The rows in the newest version's columns.

    Args:
        table: The rows as stored.
        version: What the part says of itself; "" before version 2.
        newest: The version that this package writes.

    Raises:
        ValueError: The version is unknown, or newer than this package reads.
    """
    if not version:
        number = 1 if set(_ADDED_IN_1) & set(table.column_names) else 0
    elif not version.isdecimal():
        raise ValueError(f"its schema version is {version!r}, which is no number")
    else:
        number = int(version)
    if number > newest:
        raise ValueError(
            f"it was written in version {number} of the table's schema, and this kronecker-probe "
            f"reads up to {newest}: install a newer kronecker-probe"
        )
    for step in _STEPS[number:]:
        table = step(table)
    return table


def _to_1(table: pa.Table) -> pa.Table:
    for name in _ADDED_IN_1:
        table = table.append_column(name, pa.nulls(table.num_rows, pa.float64()))
    return table


def _to_2(table: pa.Table) -> pa.Table:
    names = [_RENAMED_IN_2.get(name, name) for name in table.column_names]
    table = table.rename_columns(names)
    if not {"approximation", "metric", "note", "value", "low", "stderr"} <= set(names):
        return table  # no measurement table: the caller says what it lacks
    rows = table.select(["approximation", "metric", "note", "value", "low", "stderr"]).to_pandas()
    approximations = rows["approximation"].replace("live", "in-use")
    metrics = rows["metric"].str.replace(r"^live_", "in_use_", regex=True)
    added = {
        "interval": _intervals(rows),
        "copies": _parsed(rows, metrics == "norm", r"^(\d+) of \d+ data have the same gradients"),
        "rule": _parsed(rows, metrics == "in_use_rule", r"^live follows (\S+)"),
        "reason": _reasons(rows, metrics),
    }
    notes = rows["note"].where(metrics != "in_use_rule", None)
    texts = (("approximation", approximations), ("metric", metrics), ("note", notes))
    for name, values in texts:
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(values, pa.string(), from_pandas=True))
    for name, kind in _TYPES_OF_2.items():
        if name in added:
            column = pa.array(added[name], from_pandas=True).cast(kind)
        else:
            column = pa.nulls(table.num_rows, kind)
        table = table.append_column(name, column)
    return table


_STEPS = (_to_1, _to_2)


def _intervals(rows: pd.DataFrame) -> pd.Series[Any]:
    found = pd.Series(None, index=rows.index, dtype="object")
    found[rows["low"].notna()] = str(Interval.ROOT)
    found[rows["low"].notna() & rows["stderr"].notna()] = str(Interval.CONFIDENCE)
    found[rows["note"].str.startswith("bracket", na=False)] = str(Interval.BRACKET)
    return found


def _parsed(rows: pd.DataFrame, where: pd.Series[bool], pattern: str) -> pd.Series[Any]:
    found = rows["note"].where(where).astype("string").str.extract(pattern, expand=False)
    return found.astype("object").where(found.notna(), None)


def _reasons(rows: pd.DataFrame, metrics: pd.Series[Any]) -> pd.Series[Any]:
    undefined = rows["value"].isna() & rows["note"].notna() & (metrics != "in_use_rule")
    absent = rows["approximation"].eq("live")
    skipped = metrics == "skipped"
    codes = {note: _reason(str(note)) for note in rows.loc[undefined, "note"].unique()}
    found = rows["note"].astype("object").map(codes).astype("object").where(undefined, None)
    unknown = undefined & found.isna()
    found[unknown] = str(ReasonCode.UNDEFINED)
    found[unknown & absent] = str(ReasonCode.NO_PRECONDITIONER)
    found[unknown & skipped] = str(ReasonCode.NOT_MEASURABLE)
    return found


def _reason(note: str) -> str | None:
    return next((str(code) for pattern, code in _REASONS if re.search(pattern, note)), None)
