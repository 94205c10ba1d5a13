"""run.json: the record of a run, and the comparison of two configs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from kronecker_probe.errors import InvalidInputError, RunDirectoryError
from kronecker_probe.tracking.run_directory.files import naming, write_atomically

FILE = "run.json"
FORMAT_KEY = "kronecker_probe_run"  # marks a run.json as ours; the value is the format's version
FORMAT = 1


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Writes run.json into ``directory``, whole or not at all."""
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(directory / FILE, text.encode() + b"\n")


def read_record(directory: Path) -> dict[str, Any]:
    """The run.json of a run of ours, in any version of the format.

    Raises:
        RunDirectoryError: the file cannot be read, is damaged, or is not ours.
    """
    path = directory / FILE
    with naming("read", path):
        data = path.read_bytes()
    with contextlib.suppress(ValueError):  # undecodable bytes and broken JSON alike
        record = json.loads(data)
        if (
            isinstance(record, dict)
            and isinstance(record.get(FORMAT_KEY), int)
            and isinstance(record.get("config"), dict)
            and "status" in record
        ):
            return record
    raise RunDirectoryError(
        f"{path} was not written by kronecker-probe, or is damaged; choose another path."
    )


def as_json(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` as it will come back from run.json (tuples as lists).

    Raises:
        InvalidInputError: an option is no JSON value; names it.
    """
    for option, value in config.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidInputError(
                f"Option {option!r} = {value!r} of a run cannot be stored as JSON ({error}); "
                "give numbers, strings, lists or dicts."
            ) from error
    plain: dict[str, Any] = json.loads(json.dumps(config, allow_nan=False))
    return plain


def differing(stored: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The options in which two configs differ, each with its stored and its new value."""
    old, now = _flat(stored), _flat(new)
    return [
        f"{option}: {_shown(old, option)} in the run, {_shown(now, option)} now"
        for option in old | now
        if option not in old or option not in now or old[option] != now[option]
    ]


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as "optimizer.lr" -> value."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _shown(options: dict[str, Any], option: str) -> str:
    return json.dumps(options[option], ensure_ascii=False) if option in options else "absent"
