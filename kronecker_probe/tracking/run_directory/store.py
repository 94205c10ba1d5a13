"""A run directory: what was measured, with what, and where the rest of the run lies.

::

    runs/digits-mlp/
      run.json                          config, seed, versions, device, commit, status
      run.lock                          held by the process that writes
      measurements/step-000020.parquet  one part per probed step
      checkpoints/  figures/  report.html

Every file is written aside and renamed, so that killing the process at any moment loses nothing
that was measured. Only Parquet, JSON and safetensors: opening a run never executes code. Nothing
is written or deleted through a symbolic link in the directory.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, final

import pandas as pd

from kronecker_probe.errors import RunDirectoryError, unknown_name
from kronecker_probe.tracking.run_directory import lock, provenance
from kronecker_probe.tracking.run_directory.files import (
    is_temporary,
    make_directory,
    naming,
    refuse_links,
    remove_temporaries,
    shown,
)
from kronecker_probe.tracking.run_directory.parts import Parts
from kronecker_probe.tracking.run_directory.record import (
    FILE,
    FORMAT,
    STATUSES,
    RunRecord,
    as_json,
    differing,
    read_record,
    write_record,
)

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

    def __init__(self, path: Path, record: RunRecord) -> None:
        self.path = path
        self._record = record
        self._parts = Parts(path)
        self._lock: lock.Lock | None = None  # a writer's

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
        record = RunRecord(
            kronecker_probe_run=FORMAT,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            status="running",
            reason=None,
            seed=seed,
            device=device,
            commit=provenance.commit(),
            versions=provenance.versions(),
            machine=provenance.machine(),
            config=as_json(config),
        )
        with naming("create the run directory", directory):
            if directory.exists() and not directory.is_dir():
                raise RunDirectoryError(
                    f"{shown(directory)} is a file; choose another path for the run."
                )
            directory.mkdir(parents=True, exist_ok=True)
            _deletable(directory, overwrite)  # nothing is put into a directory of others' files
            held = lock.Lock(directory)
            for file in _deletable(directory, overwrite):
                file.unlink(missing_ok=True)
            # run.json is still the old one: killed here, this is a run directory nevertheless
            store = cls(directory, record)
            store._lock = held
            write_record(directory, record)
            for name in _OWN_FILES:
                make_directory(directory / name, inside=directory)
        return store

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Opens a stored run for reading; changes nothing on disk.

        Raises:
            RunDirectoryError: there is no run at ``path``, its run.json is damaged, or a newer
                version wrote it.
        """
        directory = Path(path)
        if not (directory / FILE).exists():
            what = "has no run.json" if directory.is_dir() else "is not a directory"
            raise RunDirectoryError(
                f"No run at {shown(directory)}: it {what}; give the path of a run."
            )
        return cls(directory, read_record(directory))

    @classmethod
    def resume(cls, path: str | Path, config: dict[str, Any]) -> Self:
        """Opens a stored run to go on with it, and clears away what a killed process left.

        Temporary files are deleted; parts that cannot be read are moved aside as ``*.bad``, so
        that their steps count as not measured.

        Raises:
            RunDirectoryError: no run at ``path``, or its config differs from ``config``.
        """
        store = cls.open(path)
        for own in (FILE, *_OWN_FILES, "report.html"):
            refuse_links(store.path / own, store.path)
        store._lock = lock.Lock(store.path)
        store.check_resumable(config)
        store.set_status("running")
        for directory in (store.path, *(store.path / own for own in _OWN_FILES)):
            remove_temporaries(directory)
        for name in store.damaged():
            store._parts.move_aside(store.path / name)
        return store

    @property
    def measurements(self) -> Path:
        """The directory of the parts."""
        return self._parts.path

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
        return dict(self._record.config)

    @property
    def record(self) -> dict[str, Any]:
        """All of run.json: config, seed, device, versions, machine, commit, created, status."""
        return self._record.to_json()

    @property
    def status(self) -> str:
        """How the run stands: "running", "done", "interrupted" or "failed"."""
        return self._record.status

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
        why = None if reason is None else shown(reason)
        self._update(status=status, reason=why)

    def note_rates(self, rates: Sequence[float]) -> None:
        """Records the learning rates with which the run started, once.

        Not in the config, which says what was asked for (None for an optimizer's own default) and
        which :meth:`resume` compares; runs from before have none, and go on.

        Args:
            rates: Those of the optimizer's groups, each once.

        Raises:
            RunDirectoryError: run.json cannot be written; the old one is left as it was.
        """
        if self._record.learning_rates is None:
            self._update(learning_rates=[float(rate) for rate in rates])

    def _update(self, **changes: Any) -> None:
        self._record = self._record.model_copy(update=changes)
        write_record(self.path, self._record)

    def check_resumable(self, config: dict[str, Any]) -> None:
        """Refuses to go on with a run under other options.

        Raises:
            RunDirectoryError: options differ; names each with its stored and its new value.
        """
        options = differing(self.config, as_json(config))
        if options:
            raise RunDirectoryError(
                f"Cannot resume {shown(self.path)}: options differ ({'; '.join(options)}). "
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
        return self._parts.write(step, frame)

    def part_path(self, step: int) -> Path:
        """Where the part of probed step ``step`` lies, written or not."""
        return self._parts.of(step)

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` lies, written or not."""
        return self.checkpoints / f"step-{step:06d}.safetensors"

    def has_part(self, step: int) -> bool:
        """Whether step ``step`` is stored and whole; a truncated part counts as not measured."""
        return self._parts.has(step)

    def steps(self) -> list[int]:
        """The probed steps whose parts are stored and whole, ascending."""
        return self._parts.steps()

    def damaged(self) -> dict[str, str]:
        """Parts that cannot be read: path below the run directory -> why."""
        return self._parts.damaged()

    def read(self, *, strict: bool = True) -> pd.DataFrame:
        """All parts as one table in the schema's dtypes, sorted by step.

        A part is read from disk once, and again only when its file has changed.

        Args:
            strict: refuse a run with a damaged part; False leaves such parts out and warns.

        Raises:
            RunDirectoryError: a part cannot be read and ``strict`` is set; names the file.
        """
        return self._parts.table(strict=strict)


def _deletable(directory: Path, overwrite: bool) -> list[Path]:
    """What must go from ``directory`` before a run starts in it, but for run.json.

    Raises:
        RunDirectoryError: It holds files that are no run, or a run and ``overwrite`` is not set,
            or a link in the place of a file that would be deleted.
    """
    found = list(directory.iterdir())
    leftovers = [path for path in found if is_temporary(path.name)]
    if all(is_temporary(path.name) or path.name == lock.FILE for path in found):
        return leftovers  # empty, or of a run that was killed before its run.json was there
    if not (directory / FILE).exists():
        raise RunDirectoryError(
            f"{shown(directory)} is not empty and holds no run; choose another path for the run."
        )
    record = read_record(directory)
    if not overwrite:
        raise RunDirectoryError(
            f"{shown(directory)} holds another run (of {record.created}, {record.status}); "
            "go on with it by --resume (resume=True), delete it by --overwrite (overwrite=True), "
            "or choose another path."
        )
    refuse_links(directory / FILE, directory)
    for name, pattern in _OWN_FILES.items():
        own = directory / name
        refuse_links(own, directory)
        leftovers += [
            path
            for path in (own.iterdir() if own.is_dir() else ())
            if pattern.fullmatch(path.name) or is_temporary(path.name)
        ]
    every = [*leftovers, directory / "report.html"]
    for path in every:
        refuse_links(path, directory)
    return [path for path in every if path.is_file()]
