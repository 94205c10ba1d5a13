"""A run directory: what was measured, with what, and where the rest of the run lies.

::

    runs/digits-mlp/
      run.json                          config, seed, versions, device, commit, status
      measurements/step-000020.parquet  one part per probed step
      checkpoints/  figures/  report.html

Every file is written aside and renamed, so that killing the process at any moment loses nothing
that was measured. Only Parquet, JSON and safetensors: opening a run never executes code.
"""

from __future__ import annotations

import datetime
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, final

import pandas as pd

from kronecker_probe.errors import InvalidInputError, RunDirectoryError, unknown_name
from kronecker_probe.table import schema
from kronecker_probe.tracking.run_directory import provenance
from kronecker_probe.tracking.run_directory.files import (
    is_temporary,
    naming,
    remove_temporaries,
    write_atomically,
)
from kronecker_probe.tracking.run_directory.lock import Lock
from kronecker_probe.tracking.run_directory.record import (
    FILE,
    FORMAT,
    FORMAT_KEY,
    as_json,
    differing,
    read_record,
    write_record,
)

STATUSES = ("running", "done", "interrupted", "failed")
_PART = re.compile(r"step-(\d+)\.parquet")
# what --overwrite may delete, directory by directory; any other file is the user's
_OWN_FILES = {
    "measurements": re.compile(r"step-\d+\.parquet(\.\d+)?(\.bad)?"),
    "checkpoints": re.compile(r"step-\d+(\.[\w-]+)*\.(safetensors|json)"),
    "figures": re.compile(r"(trajectory|ladder|spectrum|training)\.(png|svg)"),
}


@final
class RunStore:
    """One run directory; :meth:`create`, :meth:`resume` or :meth:`open` it.

    Attributes:
        path: the run directory.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self._record = record
        self._lock: Lock | None = None  # a writer's

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: dict[str, Any],
        *,
        seed: int | None = None,
        device: str | None = None,
        overwrite: bool = False,
    ) -> Self:
        """Starts a run in ``path``, which must not exist, be empty, or hold a run to overwrite.

        Args:
            path: the run directory; missing parents are made.
            config: the options of the run, as JSON values; :meth:`resume` compares them.
            seed: the seed of the run, for the record.
            device: the device of the run, for the record.
            overwrite: delete the run that ``path`` holds, and nothing else that lies there.

        Raises:
            RunDirectoryError: ``path`` holds another run, or files that are no run, or cannot be
                written.
            InvalidInputError: an option of ``config`` is no JSON value.
        """
        directory = Path(path)
        record = {
            FORMAT_KEY: FORMAT,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "status": "running",
            "reason": None,
            "seed": seed,
            "device": device,
            "commit": provenance.commit(),
            "versions": provenance.versions(),
            "machine": provenance.machine(),
            "config": as_json(config),
        }
        with naming("create the run directory", directory):
            if directory.exists() and not directory.is_dir():
                raise RunDirectoryError(f"{directory} is a file; choose another path for the run.")
            directory.mkdir(parents=True, exist_ok=True)
            lock = Lock(directory)
            _make_room(directory, overwrite)
            store = cls(directory, record)
            store._lock = lock
            write_record(directory, record)  # first of all, so that a kill leaves a run or nothing
            for own in (store.measurements, store.checkpoints, store.figures):
                own.mkdir(exist_ok=True)
        return store

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Opens a stored run for reading; changes nothing on disk.

        Raises:
            RunDirectoryError: there is no run at ``path``, or a newer version wrote it.
        """
        directory = Path(path)
        if not (directory / FILE).is_file():
            what = "has no run.json" if directory.is_dir() else "is not a directory"
            raise RunDirectoryError(f"No run at {directory}: it {what}; give the path of a run.")
        record = read_record(directory)
        if record[FORMAT_KEY] > FORMAT:
            raise RunDirectoryError(
                f"{directory} was written in run format {record[FORMAT_KEY]}, this version "
                f"reads up to {FORMAT}; upgrade kronecker-probe."
            )
        return cls(directory, record)

    @classmethod
    def resume(cls, path: str | Path, config: dict[str, Any]) -> Self:
        """Opens a stored run to go on with it, and clears away what a killed process left.

        Temporary files are deleted; parts that cannot be read are moved aside as ``*.bad``, so
        that their steps count as not measured.

        Raises:
            RunDirectoryError: no run at ``path``, or its config differs from ``config``.
        """
        store = cls.open(path)
        store._lock = Lock(store.path)
        store.check_resumable(config)
        store.set_status("running")
        for directory in (store.path, store.measurements, store.checkpoints, store.figures):
            remove_temporaries(directory)
        for name in store.damaged():
            store._move_aside(store.path / name)
        return store

    @property
    def measurements(self) -> Path:
        """The directory of the parts."""
        return self.path / "measurements"

    @property
    def checkpoints(self) -> Path:
        """The directory of the checkpoints, named ``step-000020.safetensors`` or ``.json``."""
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        """The directory of the figures."""
        return self.path / "figures"

    @property
    def report(self) -> Path:
        """The path of the HTML report."""
        return self.path / "report.html"

    @property
    def config(self) -> dict[str, Any]:
        """The options of the run, as they came back from JSON."""
        return dict(self._record["config"])

    @property
    def record(self) -> dict[str, Any]:
        """All of run.json: config, seed, device, versions, machine, commit, created, status."""
        return dict(self._record)

    @property
    def status(self) -> str:
        """One of :data:`STATUSES`."""
        return str(self._record["status"])

    def set_status(self, status: str, reason: str | None = None) -> None:
        """Records how the run stands, and why.

        Args:
            status: "running", "done", "interrupted" or "failed".
            reason: one sentence for the report; None clears an older one.

        Raises:
            UnknownNameError: no such status.
            RunDirectoryError: run.json cannot be written; the old one is left as it was.
        """
        if status not in STATUSES:
            raise unknown_name("status", status, STATUSES)
        self._record = self._record | {"status": status, "reason": reason}
        write_record(self.path, self._record)

    def note_rates(self, rates: Sequence[float]) -> None:
        """Records the learning rates with which the run started, once.

        Not in the config, which says what was asked for (None for an optimizer's own default) and
        which :meth:`resume` compares; runs from before have none, and go on.

        Args:
            rates: Those of the optimizer's groups, each once.

        Raises:
            RunDirectoryError: run.json cannot be written; the old one is left as it was.
        """
        if "learning_rates" not in self._record:
            self._record = self._record | {"learning_rates": list(rates)}
            write_record(self.path, self._record)

    def check_resumable(self, config: dict[str, Any]) -> None:
        """Refuses to go on with a run under other options.

        Raises:
            RunDirectoryError: options differ; names each with its stored and its new value.
        """
        options = differing(self.config, as_json(config))
        if options:
            raise RunDirectoryError(
                f"Cannot resume {self.path}: options differ ({'; '.join(options)}). "
                "Resume with the options of the run, or choose another path."
            )

    def write_part(self, step: int, frame: pd.DataFrame) -> Path:
        """Stores the rows measured at probed step ``step``, in place of an older part of it.

        Args:
            step: optimizer steps taken; names the part.
            frame: a table of :data:`kronecker_probe.table.schema.DTYPES`; its rows may
                belong to several steps (training losses since the last probe).

        Returns:
            The path of the part.

        Raises:
            InvalidInputError: ``step`` is negative or ``frame`` does not fit the schema.
            RunDirectoryError: the part cannot be written; nothing visible has changed.
        """
        if step < 0:
            raise InvalidInputError(f"step must be at least 0, not {step}.")
        data = schema.to_parquet(frame, step)
        path = self.part_path(step)
        with naming("write", path):
            self.measurements.mkdir(exist_ok=True)
        remove_temporaries(self.measurements)
        if path.exists() and not self.has_part(step):
            self._move_aside(path)
        write_atomically(path, data)
        return path

    def part_path(self, step: int) -> Path:
        """Where the part of probed step ``step`` lies, written or not."""
        return self.measurements / f"step-{step:06d}.parquet"

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` lies, written or not."""
        return self.checkpoints / f"step-{step:06d}.safetensors"

    def has_part(self, step: int) -> bool:
        """Whether step ``step`` is stored and whole; a truncated part counts as not measured."""
        return isinstance(_load(self.part_path(step), step), pd.DataFrame)

    def steps(self) -> list[int]:
        """The probed steps whose parts are stored and whole, ascending."""
        return sorted(self._parts()[0])

    def damaged(self) -> dict[str, str]:
        """Parts that cannot be read: path below the run directory -> why."""
        return self._parts()[1]

    def read(self, *, strict: bool = True) -> pd.DataFrame:
        """All parts as one table in the schema's dtypes, sorted by step.

        Args:
            strict: refuse a run with a damaged part; False leaves such parts out and warns.

        Raises:
            RunDirectoryError: a part cannot be read and ``strict`` is set; names the file.
        """
        frames, damaged = self._parts()
        if damaged:
            named = "; ".join(f"{self.path / name}: {why}" for name, why in damaged.items())
            if strict:
                raise RunDirectoryError(
                    f"Cannot read {named}. Measure these steps again with --resume (the files "
                    "are kept as *.bad), or read the rest with strict=False."
                )
            warnings.warn(f"Left out of the table: {named}.", RuntimeWarning, stacklevel=2)
        whole = [frame for frame in frames.values() if len(frame)]
        if not whole:
            return schema.empty_table()
        table = pd.concat(whole, ignore_index=True)
        return table.sort_values("step", kind="stable", ignore_index=True)

    def _parts(self) -> tuple[dict[int, pd.DataFrame], dict[str, str]]:
        """The whole parts by step, and the damaged ones: name -> why."""
        frames: dict[int, pd.DataFrame] = {}
        damaged: dict[str, str] = {}
        with naming("read", self.measurements):
            if not self.measurements.is_dir():
                return frames, damaged
            paths = sorted(self.measurements.iterdir())
        for path in paths:
            match = _PART.fullmatch(path.name)
            if match is None:
                continue
            step = int(match[1])
            part = _load(path, step)
            if path != self.part_path(step):  # step-20 beside step-000020 would count twice
                part = f"a part of step {step} is named {self.part_path(step).name}"
            if isinstance(part, pd.DataFrame):
                frames[step] = part
            else:
                damaged[f"{self.measurements.name}/{path.name}"] = part
        return frames, damaged

    def _move_aside(self, path: Path) -> None:
        aside, count = path.with_name(f"{path.name}.bad"), 0
        while aside.exists():
            count += 1
            aside = path.with_name(f"{path.name}.{count}.bad")
        with naming("move aside", path):
            path.rename(aside)


def _load(path: Path, step: int) -> pd.DataFrame | str:
    """The rows of a part, or why it has none."""
    if not path.is_file():
        return "there is no such file"
    with naming("read", path):
        data = path.read_bytes()
    try:
        return schema.from_parquet(data, step)
    except ValueError as error:
        return str(error)


def _make_room(directory: Path, overwrite: bool) -> None:
    """Makes sure that ``directory`` holds no run, deleting one only where that was asked for."""
    if all(is_temporary(path.name) for path in directory.iterdir()):
        remove_temporaries(directory)  # a run killed before its run.json was there
        return
    if not (directory / FILE).exists():
        raise RunDirectoryError(
            f"{directory} is not empty and holds no run; choose another path for the run."
        )
    record = read_record(directory)
    if not overwrite:
        raise RunDirectoryError(
            f"{directory} holds another run (of {record.get('created')}, "
            f"{record.get('status')}); go on with it by --resume (resume=True), delete it by "
            "--overwrite (overwrite=True), "
            "or choose another path."
        )
    remove_temporaries(directory)
    (directory / "report.html").unlink(missing_ok=True)
    for name, pattern in _OWN_FILES.items():
        own = directory / name
        for path in own.iterdir() if own.is_dir() else ():
            if path.is_file() and (pattern.fullmatch(path.name) or is_temporary(path.name)):
                path.unlink()
    # run.json stays until the new one replaces it: killed here, this is still a run directory
