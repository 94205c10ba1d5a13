"""Reading a JSON file as a typed model: whatever it holds, the model or one clear error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from kronecker_probe.errors import RunDirectoryError
from kronecker_probe.tracking.run_directory.files import naming, shown

DEEPEST = 32  # lists and objects within each other
LARGEST = 2**26  # bytes

_Model = TypeVar("_Model", bound=BaseModel)


def read_json(path: Path, model: type[_Model], remedy: str) -> _Model:
    """The contents of a JSON file, checked.

    Args:
        path: The file.
        model: What it must hold.
        remedy: What to do about a damaged file, as the end of a sentence.

    Raises:
        RunDirectoryError: The file cannot be read or does not fit the model; the message names
            file, field, value and remedy.
    """
    with naming("read", path):
        data = path.read_bytes()
    try:
        return parsed(data, model)
    except ValueError as error:
        raise RunDirectoryError(
            f"{shown(path)} is damaged, or another program's: {error}; {remedy}."
        ) from error


def parsed(data: bytes | str, model: type[_Model]) -> _Model:
    """A model from JSON text.

    Raises:
        ValueError: The text is no JSON or does not fit the model; the message says where and why.
    """
    content = loaded(data)
    try:
        return model.model_validate(content, strict=True)
    except ValidationError as error:
        told = "; ".join(_told(dict(one)) for one in error.errors(include_url=False)[:3])
        raise ValueError(told) from error


def loaded(data: bytes | str) -> Any:
    """The value of a JSON text: finite numbers, text that can be encoded, at most 32 levels.

    Raises:
        ValueError: It is another one, or no JSON.
    """
    if len(data) > LARGEST:
        raise ValueError(f"it has {len(data)} bytes, the largest allowed is {LARGEST}")
    try:
        content = json.loads(data, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError(f"its values are nested deeper than {DEEPEST}") from error
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error})") from error
    if why := _unfit(content):
        raise ValueError(why)
    return content


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _unfit(content: object) -> str:
    """Why a value cannot be used, whatever is expected of it; "" where it can."""
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            return f"its values are nested deeper than {DEEPEST}"
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and not _encodable(value):
                return f"the text {value!r} cannot be encoded"
            elif isinstance(value, float) and not math.isfinite(value):
                return "it has a number beyond the range of float64"
        level = inner
    return ""


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _told(error: dict[str, Any]) -> str:
    """One failed check as "field config = 5: Input should be a valid dictionary"."""
    field = ".".join(map(str, error["loc"])) or "the file"
    if error["type"] == "missing":
        return f"the field {field} is missing"
    value = repr(error["input"])
    return f"{field} = {value if len(value) < 80 else value[:77] + '...'}: {error['msg']}"
