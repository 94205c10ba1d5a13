"""The measurement table: one tidy schema for every part, and its Parquet encoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.table.columns import COLUMNS, DTYPES, Column
from kronecker_probe.table.migrations import migrated

# Renaming or adding a column takes the next version and a step in :mod:`table.migrations`.
VERSION = 2
_ARROW = {"int64": pa.int64(), "Int64": pa.int64(), "string": pa.string(), "float64": pa.float64()}
ARROW_SCHEMA = pa.schema(
    [pa.field(name, _ARROW[dtype], nullable=name != "step") for name, dtype in DTYPES.items()]
)
_PANDAS = {pa.int64(): pd.Int64Dtype(), pa.string(): pd.StringDtype()}
_STEP_KEY, _VERSION_KEY = b"kronecker_probe.step", b"kronecker_probe.schema"


def empty_table() -> pd.DataFrame:
    """A measurement table without rows, with the columns and dtypes of every other."""
    return pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in DTYPES.items()})


def conform(frame: pd.DataFrame) -> pd.DataFrame:
    """The same rows with the schema's column order and dtypes.

    Args:
        frame: a table with exactly the columns of :data:`DTYPES`, in any order.

    Raises:
        InvalidInputError: a column is missing or unknown, a value does not fit its column, a
            required value is null.
    """
    missing = [name for name in DTYPES if name not in frame.columns]
    unknown = [str(name) for name in frame.columns if name not in DTYPES]
    if missing or unknown or len(frame.columns) != len(DTYPES):
        raise InvalidInputError(
            f"A measurement table has the columns {', '.join(DTYPES)}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}."
        )
    columns = {column.name: _cast(frame[column.name], column) for column in COLUMNS}
    return pd.DataFrame(columns).reset_index(drop=True)


def _cast(values: pd.Series[Any], column: Column) -> pd.Series[Any]:
    try:
        # through Int64, because a plain astype("int64") would cut 1.5 down to 1
        safe = values.astype("Int64") if column.dtype == "int64" else values
        if column.required and safe.isna().any():
            raise ValueError("it has a null; fill it")
        return safe.astype(column.dtype)  # type: ignore[call-overload, no-any-return]
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError(
            f"Column {column.name!r} of a measurement table must hold {column.dtype}: {error}."
        ) from error


def _faults(table: pa.Table) -> str:
    """What breaks the contract: unknown codes, values below the least, intervals upside down."""
    found = []
    for column in COLUMNS:
        values = table.column(column.name)
        if values.null_count == len(values):
            continue
        if column.codes is not None:
            unknown = set(pc.unique(values).to_pylist()) - column.codes - {None}
            if unknown:
                known = ", ".join(sorted(column.codes))
                found.append(f"{column.name} has {min(unknown)!r}, not one of {known}")
        if column.least is not None:
            least = pc.min(values).as_py()
            if least is not None and least < column.least:
                found.append(f"{column.name} has {least}, below {column.least:g}")
    if pc.any(pc.greater(table.column("low"), table.column("high"))).as_py():
        found.append("low is above high")
    return "; ".join(found)


def to_parquet(frame: pd.DataFrame, step: int) -> bytes:
    """The part of probed step ``step`` as the bytes of a Parquet file (Snappy, checksummed pages).

    Raises:
        InvalidInputError: ``frame`` does not fit the schema (:func:`conform`), or has a code or a
            number that is not allowed.
    """
    table = conform(frame)
    # value goes through numpy so that NaN stays NaN; a pandas column would turn it into null
    arrays = [
        pa.array(table[name].to_numpy() if name == "value" else table[name], type=field.type)
        for name, field in zip(DTYPES, ARROW_SCHEMA, strict=True)
    ]
    about = {_STEP_KEY: str(step).encode(), _VERSION_KEY: str(VERSION).encode()}
    schema = ARROW_SCHEMA.with_metadata(about)
    part = pa.Table.from_arrays(arrays, schema=schema)
    if faults := _faults(part):
        raise InvalidInputError(f"Not a measurement table: {faults}.")
    sink = pa.BufferOutputStream()
    pq.write_table(
        part,
        sink,
        compression="snappy",
        write_page_checksum=True,
    )
    return bytes(sink.getvalue())


def from_parquet(data: bytes, step: int) -> pd.DataFrame:
    """The rows that :func:`to_parquet` wrote for ``step``.

    Raises:
        ValueError: the bytes are not a whole part of that step; the message says why.
    """
    return to_frame([read_part(data, step)])


def to_frame(parts: Sequence[pa.Table]) -> pd.DataFrame:
    """What :func:`read_part` returned, one below the other, as one table in the schema's dtypes."""
    if not parts:
        return empty_table()
    return conform(pa.concat_tables(parts).to_pandas(types_mapper=_PANDAS.get))


def read_part(data: bytes, step: int) -> pa.Table:
    """The part of ``step``, checked: whole, of that step, with the schema's columns and types.

    Raises:
        ValueError: the bytes are not a whole part of that step; the message says why.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        # from a buffer: given a path, Arrow would add columns for folders named like "lr=0.1"
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        table = file.read(use_threads=False)  # parts are small: threads cost more
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"not a whole Parquet file ({_first_line(error)})") from error
    if table.num_rows != file.metadata.num_rows:  # the footer itself has no checksum
        raise ValueError("not a whole Parquet file (its row counts disagree)")
    metadata = table.schema.metadata or {}
    table = migrated(table, metadata.get(_VERSION_KEY, b"").decode(errors="replace"), VERSION)
    found = {field.name: field.type for field in table.schema}
    expected = {field.name: field.type for field in ARROW_SCHEMA}
    if found != expected or len(table.schema) != len(expected):
        raise ValueError(f"not a measurement table ({_difference(found, expected)})")
    stored = metadata.get(_STEP_KEY, b"no step").decode(errors="replace")
    if stored != str(step):
        raise ValueError(f"the file holds the measurements of step {stored}, not of step {step}")
    for column in COLUMNS:
        if column.required and table.column(column.name).null_count:
            raise ValueError(f"column {column.name!r} has a null")
    table = table.select(list(DTYPES)).replace_schema_metadata()
    if faults := _faults(table):
        raise ValueError(faults)
    return table


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {found[name]}, expected {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    named = [("missing columns", missing), ("unknown columns", unknown), ("wrong types", wrong)]
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in named if names)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
