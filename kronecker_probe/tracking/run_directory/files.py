"""Writing a file whole or not at all, with errors that name the path and the remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from kronecker_probe.errors import RunDirectoryError

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
# what some file systems answer to the fsync of a directory
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}


@contextlib.contextmanager
def naming(action: str, path: Path) -> Iterator[None]:
    """Turns an OSError inside the block into a RunDirectoryError that names path and remedy."""
    try:
        yield
    except RunDirectoryError:
        raise
    except OSError as error:
        cause = error.strerror or str(error)
        raise RunDirectoryError(
            f"Cannot {action} {path}: {cause}. What is already stored is intact; {_remedy(error)}."
        ) from error


def _remedy(error: OSError) -> str:
    if error.errno in _NO_SPACE:
        return "free space on that disk, then go on with --resume"
    if error.errno in _NOT_ALLOWED:
        return "choose a path that you may write, or change its permissions"
    return "check that path, or choose another"


def write_atomically(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path``: readers see the old file or the whole new one, never a part.

    The bytes go to a temporary file beside ``path``, which is fsynced and renamed; the directory
    is fsynced too, so that the rename outlives a power cut.

    Raises:
        RunDirectoryError: the directory is not writable or the disk is full; an older file at
            ``path`` is left as it was, and no temporary file stays behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming("write", path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:  # Ctrl-C included: leave nothing half-written
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":  # elsewhere a directory cannot be opened
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(descriptor)


def is_temporary(name: str) -> bool:
    """Whether ``name`` is that of a file that :func:`write_atomically` had not finished."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_temporaries(directory: Path) -> None:
    """Deletes what killed writes left in ``directory``; nothing where there is no directory."""
    with naming("clean", directory):
        if not directory.is_dir():
            return
        for path in directory.iterdir():
            if is_temporary(path.name):
                path.unlink(missing_ok=True)
