"""One writer for a run directory: an operating system's lock on ``run.lock`` in it."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import warnings
from pathlib import Path

from filelock import FileLock, Timeout

from kronecker_probe.errors import RunDirectoryError
from kronecker_probe.tracking.run_directory.files import naming, refuse_links, shown

FILE = "run.lock"
# what a file system without locks answers
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}
# Those of this process: each counts how often it is taken. They are kept, because a forked child
# that dropped its copy would unlock the file for its parent as well.
_LOCKS: dict[Path, FileLock] = {}


class Lock:
    """Held from construction until the object or the process goes away, however it ends.

    The file stays, with the process id and the machine of the last holder, and means nothing by
    itself: the system drops the lock with its process, so that no lock is ever stale. A process
    may take the same lock twice. On NFS the lock holds between machines where the server has a
    lock service (any Linux client and server of today); on a file system without locks there is a
    warning, and one writer is then up to the user.

    Raises:
        RunDirectoryError: Another process writes to ``directory``, or the lock file is a link or
            cannot be created.
    """

    def __init__(self, directory: Path) -> None:
        file = directory / FILE
        refuse_links(file, directory)
        holder = _holder(file)  # before trying: some versions of filelock empty the file
        self._lock: FileLock | None = None
        real = directory.resolve() / FILE
        lock = _LOCKS.setdefault(real, FileLock(real, timeout=0, thread_local=False))
        with naming("lock", file):
            try:
                lock.acquire()
            except Timeout as error:
                raise RunDirectoryError(
                    f"Another process{holder} is writing to {shown(directory)}; wait for it, stop "
                    "it, or choose another path."
                ) from error
            except (OSError, NotImplementedError) as error:
                if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                    raise
                warnings.warn(
                    f"{shown(directory)} cannot be locked ({error}): make sure that no other "
                    "process writes to it.",
                    RuntimeWarning,
                    stacklevel=3,
                )
                return
        self._lock, self._process = lock, os.getpid()
        with contextlib.suppress(OSError):  # where a locked file cannot be written, it is unnamed
            file.write_text(f"{os.getpid()} on {platform.node()}\n")

    def __del__(self) -> None:
        # a forked child shares the lock: it is its parent's to give back
        lock = getattr(self, "_lock", None)
        if lock is not None and self._process == os.getpid():
            lock.release()


def _holder(file: Path) -> str:
    """Who wrote the lock file last, for messages."""
    try:
        process, _, machine = file.read_text(errors="replace")[:200].strip().partition(" on ")
    except OSError:
        return ""
    known = process.isdecimal() and machine.isprintable()
    return f" (process {process} on {machine})" if known else ""
