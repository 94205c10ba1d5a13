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


# The system drops a process's lock when *any* descriptor of the file is closed: one is shared.
_shared: dict[Path, tuple[int, int]] = {}  # lock file -> descriptor, users


class Lock:
    """Held from construction until the object or the process goes away.

    A process may take the same lock twice; another process is refused.

    Raises:
        RunDirectoryError: Another process writes to ``directory``.
    """

    def __init__(self, directory: Path) -> None:
        self._file: Path | None = None
        if fcntl is None:
            return
        file = _lock_file(directory)
        descriptor, users = _shared.get(file, (-1, 0))
        if users == 0:
            try:
                descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
            except OSError:
                return  # no temporary directory: go on without
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno not in _HELD:
                    return  # a file system without locks
                raise RunDirectoryError(
                    f"Another process is writing to {directory}; wait for it, stop it, or choose "
                    "another path."
                ) from error
        _shared[file] = descriptor, users + 1
        self._file = file

    def __del__(self) -> None:
        if self._file is None:
            return
        descriptor, users = _shared[self._file]
        if users > 1:
            _shared[self._file] = descriptor, users - 1
        else:
            del _shared[self._file]
            os.close(descriptor)


def _lock_file(directory: Path) -> Path:
    name = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"kronecker-probe-{user}-{name}.lock"
