"""The measurement table: one tidy schema for every part, and its Parquet encoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from kronecker_probe.errors import InvalidInputError

# column -> pandas dtype; the Arrow types below say the same to Parquet
DTYPES = {
    "step": "int64",
    "parameter": "string",
    "m": "Int64",
    "n": "Int64",
    "n_examples": "Int64",
    "n_columns": "Int64",
    "n_positions": "Int64",
    "target": "string",
    "approximation": "string",
    "metric": "string",
    "index": "Int64",
    "kind": "string",
    "value": "float64",
    "stderr": "float64",
    "low": "float64",
    "high": "float64",
    "n_eff": "float64",
    "note": "string",
}
# Columns that runs stored by version 0.1 lack; they read as null.
ADDED = ("stderr", "low", "high", "n_eff")
_REQUIRED = ("step", "metric")
_ARROW = {"int64": pa.int64(), "Int64": pa.int64(), "string": pa.string(), "float64": pa.float64()}
ARROW_SCHEMA = pa.schema(
    [pa.field(name, _ARROW[dtype], nullable=name != "step") for name, dtype in DTYPES.items()]
)
_PANDAS = {pa.int64(): pd.Int64Dtype(), pa.string(): pd.StringDtype()}
_STEP_KEY = b"kronecker_probe.step"


def empty_table() -> pd.DataFrame:
    """A measurement table without rows, with the columns and dtypes of every other."""
    return pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in DTYPES.items()})


def conform(frame: pd.DataFrame) -> pd.DataFrame:
    """The same rows with the schema's column order and dtypes.

    Args:
        frame: a table with exactly the columns of :data:`DTYPES`, in any order.

    Raises:
        InvalidInputError: a column is missing or unknown, a value does not fit its column, or
            ``step`` or ``metric`` is null.
    """
    missing = [name for name in DTYPES if name not in frame.columns]
    unknown = [str(name) for name in frame.columns if name not in DTYPES]
    if missing or unknown or len(frame.columns) != len(DTYPES):
        raise InvalidInputError(
            f"A measurement table has the columns {', '.join(DTYPES)}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}."
        )
    columns = {name: _cast(frame[name], name, dtype) for name, dtype in DTYPES.items()}
    return pd.DataFrame(columns).reset_index(drop=True)


def _cast(column: pd.Series[Any], name: str, dtype: str) -> pd.Series[Any]:
    if name in _REQUIRED and column.isna().any():
        raise InvalidInputError(f"Column {name!r} of a measurement table holds a null; fill it.")
    try:
        # through Int64, because a plain astype("int64") would cut 1.5 down to 1
        safe = column.astype("Int64") if dtype == "int64" else column
        return safe.astype(dtype)  # type: ignore[call-overload, no-any-return]
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError(
            f"Column {name!r} of a measurement table must hold {dtype}: {error}."
        ) from error


def to_parquet(frame: pd.DataFrame, step: int) -> bytes:
    """The part of probed step ``step`` as the bytes of a Parquet file (zstd, checksummed pages).

    Raises:
        InvalidInputError: ``frame`` does not fit the schema (:func:`conform`).
    """
    table = conform(frame)
    # value goes through numpy so that NaN stays NaN; a pandas column would turn it into null
    arrays = [
        pa.array(table[name].to_numpy() if name == "value" else table[name], type=field.type)
        for name, field in zip(DTYPES, ARROW_SCHEMA, strict=True)
    ]
    schema = ARROW_SCHEMA.with_metadata({_STEP_KEY: str(step).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=schema),
        sink,
        compression="zstd",
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
        table = file.read()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"not a whole Parquet file ({_first_line(error)})") from error
    if table.num_rows != file.metadata.num_rows:  # the footer itself has no checksum
        raise ValueError("not a whole Parquet file (its row counts disagree)")
    found = {field.name: field.type for field in table.schema}
    expected = {field.name: field.type for field in ARROW_SCHEMA}
    if not set(ADDED) & found.keys():
        for name in ADDED:
            table = table.append_column(name, pa.nulls(table.num_rows, expected[name]))
        found |= {name: expected[name] for name in ADDED}
    if found != expected or len(table.schema) != len(expected):
        raise ValueError(f"not a measurement table ({_difference(found, expected)})")
    stored = (table.schema.metadata or {}).get(_STEP_KEY, b"no step").decode(errors="replace")
    if stored != str(step):
        raise ValueError(f"the file holds the measurements of step {stored}, not of step {step}")
    for name in _REQUIRED:
        if table.column(name).null_count:
            raise ValueError(f"column {name!r} holds a null")
    return table.select(list(DTYPES)).replace_schema_metadata()


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
