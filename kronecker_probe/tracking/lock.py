"""One writer a run directory: a lock that the system drops when the process ends, however.

The lock file lies in the temporary directory of the machine, so that a run directory holds nothing
but the run; writers on two machines that share a disk do not see each other.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from pathlib import Path

from kronecker_probe.errors import RunDirectoryError

try:
    import fcntl
except ImportError:  # no POSIX locks on this system: one writer is then up to the user
    fcntl = None  # type: ignore[assignment]

_HELD = {errno.EACCES, errno.EAGAIN}


class Lock:
    """Held from construction until the object or the process goes away.

    A process may take the same lock twice; another process is refused.

    Raises:
        RunDirectoryError: Another process writes to ``directory``.
    """

    def __init__(self, directory: Path) -> None:
        self._descriptor: int | None = None
        if fcntl is None:
            return
        try:
            self._descriptor = os.open(_lock_file(directory), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            return  # no temporary directory: go on without
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                return  # a file system without locks
            raise RunDirectoryError(
                f"Another process is writing to {directory}; wait for it, stop it, or choose "
                "another path."
            ) from error

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def _lock_file(directory: Path) -> Path:
    name = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"kronecker-probe-{user}-{name}.lock"
