"""The parts of the measurement table: one Parquet file per probed step."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import final

import pandas as pd
import pyarrow as pa

from kronecker_probe.errors import InvalidInputError, RunDirectoryError
from kronecker_probe.table import schema
from kronecker_probe.tracking.run_directory.files import (
    make_directory,
    naming,
    refuse_links,
    remove_temporaries,
    shown,
    write_atomically,
)

_PART = re.compile(r"step-(\d{1,18})\.parquet")
# a file as it was when read: inode, size, time of the last change
_Version = tuple[int, int, int]


@final
class Parts:
    """The directory ``measurements`` of a run; each file is read once while it does not change.

    Attributes:
        path: The directory.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / "measurements"
        self._run = run
        self._read: dict[str, tuple[_Version, pa.Table | str]] = {}
        self._table: tuple[list[_Version], pd.DataFrame] | None = None

    def of(self, step: int) -> Path:
        """Where the part of probed step ``step`` lies, written or not."""
        return self.path / f"step-{step:06d}.parquet"

    def has(self, step: int) -> bool:
        """Whether step ``step`` is stored and whole; a truncated part counts as not measured."""
        return isinstance(self._load(self.of(step), step), pa.Table)

    def steps(self) -> list[int]:
        """The probed steps whose parts are stored and whole, ascending."""
        return sorted(self._all()[0])

    def damaged(self) -> dict[str, str]:
        """Parts that cannot be read: path below the run directory -> why."""
        return self._all()[1]

    def write(self, step: int, frame: pd.DataFrame) -> Path:
        """Stores the rows measured at ``step``; a damaged part in its place is moved aside.

        Raises:
            InvalidInputError: ``step`` is negative or ``frame`` does not fit the schema.
            RunDirectoryError: The part cannot be written; nothing visible has changed.
        """
        if step < 0:
            raise InvalidInputError(f"step must be at least 0, not {step}.")
        data = schema.to_parquet(frame, step)
        path = self.of(step)
        make_directory(self.path, inside=self._run)
        refuse_links(path, self._run)
        remove_temporaries(self.path)
        if path.exists() and not self.has(step):
            self.move_aside(path)
        write_atomically(path, data, inside=self._run)
        return path

    def move_aside(self, path: Path) -> None:
        """Renames a damaged part to ``*.bad``, or a name like it that is free."""
        aside, count = path.with_name(f"{path.name}.bad"), 0
        while aside.exists():
            count += 1
            aside = path.with_name(f"{path.name}.{count}.bad")
        with naming("move aside", path):
            path.rename(aside)

    def table(self, *, strict: bool) -> pd.DataFrame:
        """All parts as one table in the schema's dtypes, sorted by step.

        Args:
            strict: Refuse a damaged part; False leaves such parts out and warns.

        Raises:
            RunDirectoryError: A part cannot be read and ``strict`` is set; names the file.
        """
        whole, damaged = self._all()
        if damaged:
            named = "; ".join(f"{shown(self._run / name)}: {why}" for name, why in damaged.items())
            if strict:
                raise RunDirectoryError(
                    f"Cannot read {named}. Measure these steps again with --resume (the files "
                    "are kept as *.bad), or read the rest with strict=False."
                )
            warnings.warn(f"Left out of the table: {named}.", RuntimeWarning, stacklevel=3)
        versions = [self._read[self.of(step).name][0] for step in whole]
        if self._table is None or self._table[0] != versions:
            table = schema.to_frame([part for part in whole.values() if part.num_rows])
            ordered = table.sort_values("step", kind="stable", ignore_index=True)
            self._table = versions, ordered
        return self._table[1].copy()

    def _all(self) -> tuple[dict[int, pa.Table], dict[str, str]]:
        """The whole parts by step, and why others are damaged, by path below the run directory."""
        whole: dict[int, pa.Table] = {}
        damaged: dict[str, str] = {}
        with naming("read", self.path):
            paths = sorted(self.path.iterdir()) if self.path.exists() else []
        for path in paths:
            match = _PART.fullmatch(path.name)
            if match is None:
                continue
            step = int(match[1])
            part: pa.Table | str
            if path == self.of(step):
                part = self._load(path, step)
            else:  # step-20 beside step-000020 would count twice
                part = f"a part of step {step} is named {self.of(step).name}"
            if isinstance(part, str):
                damaged[f"{self.path.name}/{path.name}"] = part
            else:
                whole[step] = part
        return whole, damaged

    def _load(self, path: Path, step: int) -> pa.Table | str:
        """The rows of a part, or why it has none."""
        if path.is_dir():
            return "it is a directory"
        if not path.is_file():
            return "there is no such file"
        with naming("read", path):
            status = path.stat()
            version = (status.st_ino, status.st_size, status.st_mtime_ns)
            if path.name in self._read and self._read[path.name][0] == version:
                return self._read[path.name][1]
            data = path.read_bytes()
        part: pa.Table | str
        try:
            part = schema.read_part(data, step)
        except ValueError as error:
            part = str(error)
        self._read[path.name] = version, part
        return part
