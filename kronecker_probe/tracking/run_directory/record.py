"""run.json: the typed record of a run, and the comparison of two configs."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from kronecker_probe.errors import InvalidInputError, RunDirectoryError
from kronecker_probe.tracking.run_directory.files import shown, write_atomically
from kronecker_probe.tracking.run_directory.json_file import loaded, read_json

FILE = "run.json"
FORMAT_KEY = "kronecker_probe_run"  # marks a run.json as ours; the value is the format's version
FORMAT = 2  # 1 calls the target of a run "draws"

Status: TypeAlias = Literal["running", "done", "interrupted", "failed"]
STATUSES: tuple[str, ...] = get_args(Status)


def _moment(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time without its zone")
    return text


class RunRecord(BaseModel):
    """What run.json holds.

    Attributes:
        format: version of the format, in the file under :data:`FORMAT_KEY`.
        created: when the run was started, ISO 8601 with its time zone.
        status: how it stands.
        reason: why it was interrupted or failed.
        seed: of the run.
        device: on which it was started.
        commit: of the checkout around the working directory.
        versions: of Python, this package and its numerical dependencies.
        machine: operating system, processor and cores.
        config: the user's options, any JSON; compared on resuming.
        learning_rates: with which the run started; None in runs from before it was recorded.
    """

    model_config = ConfigDict(populate_by_name=True, frozen=True, extra="allow")

    format: int = Field(alias="kronecker_probe_run", ge=1, le=FORMAT)
    created: Annotated[str, AfterValidator(_moment)]
    status: Status
    reason: str | None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None
    device: str | None
    commit: str | None
    versions: dict[str, str]
    machine: dict[str, str]
    config: dict[str, Any]
    learning_rates: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _migrated(cls, content: Any) -> Any:
        """The record of an older format in today's words."""
        if not isinstance(content, dict) or content.get(FORMAT_KEY) != 1:
            return content
        config = content.get("config")
        if isinstance(config, dict) and "draws" in config and "target" not in config:
            renamed = {"target" if key == "draws" else key: config[key] for key in config}
            content = content | {"config": renamed}
        return content | {FORMAT_KEY: FORMAT}

    def to_json(self) -> dict[str, Any]:
        """The fields as run.json has them."""
        content = self.model_dump(by_alias=True)
        if self.learning_rates is None:
            del content["learning_rates"]
        return content


class _Format(BaseModel):
    version: int = Field(alias="kronecker_probe_run", ge=1)


def write_record(directory: Path, record: RunRecord) -> None:
    """Writes run.json into ``directory``, whole or not at all."""
    text = json.dumps(record.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(directory / FILE, text.encode() + b"\n", inside=directory)


def read_record(directory: Path) -> RunRecord:
    """The run.json of a run of ours, an older format in today's words.

    Raises:
        RunDirectoryError: the file cannot be read, is damaged, not ours, or of a newer format; the
            message names file, field, value and remedy.
    """
    path = directory / FILE
    remedy = "mend it, or choose another path for the run"
    version = read_json(path, _Format, remedy).version
    if version > FORMAT:
        raise RunDirectoryError(
            f"{shown(directory)} was written in run format {version}, this version reads up to "
            f"{FORMAT}; upgrade kronecker-probe."
        )
    return read_json(path, RunRecord, remedy)


def as_json(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` as it will come back from run.json (tuples as lists).

    Raises:
        InvalidInputError: an option is no JSON value; names it.
    """
    plain: dict[str, Any] = {}
    for option, value in config.items():
        try:
            plain |= loaded(json.dumps({option: value}, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidInputError(
                f"Option {shown(repr(option))} = {shown(repr(value))} of a run cannot be stored "
                f"as JSON ({error}); give numbers, strings, lists or dicts."
            ) from error
    return plain


def differing(stored: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The options in which two configs differ, each with its stored and its new value."""
    old, now = _flat(stored), _flat(new)
    return [
        f"{option}: {_value_shown(old, option)} in the run, {_value_shown(now, option)} now"
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


def _value_shown(options: dict[str, Any], option: str) -> str:
    return json.dumps(options[option], ensure_ascii=False) if option in options else "absent"
