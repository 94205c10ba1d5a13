"""Writing and deleting files of a run directory: whole or not at all, and never through a link."""

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


def shown(path: object) -> str:
    """A path as text that can be printed and encoded: other bytes and lone surrogates escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()


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
            f"Cannot {action} {shown(path)}: {cause}. What is already stored is intact; "
            f"{_remedy(error)}."
        ) from error


def _remedy(error: OSError) -> str:
    if error.errno in _NO_SPACE:
        return "free space on that disk, then go on with --resume"
    if error.errno in _NOT_ALLOWED:
        return "choose a path that you may write, or change its permissions"
    return "check that path, or choose another"


def refuse_links(path: Path, inside: Path) -> None:
    """Makes sure that ``path`` really lies in the directory ``inside``, which may be a link itself.

    Raises:
        RunDirectoryError: ``path`` is not below ``inside``, or is a symbolic link, or one of the
            directories between them is: writing or deleting there would reach other files.
    """
    parts = path.relative_to(inside).parts if path.is_relative_to(inside) else ("..",)
    if not parts or ".." in parts:
        raise RunDirectoryError(
            f"{shown(path)} does not lie in {shown(inside)}: nothing is written or deleted there."
        )
    for number in range(1, len(parts) + 1):
        step = inside.joinpath(*parts[:number])
        if step.is_symlink():
            raise RunDirectoryError(
                f"{shown(step)} is a symbolic link (to {shown(os.readlink(step))}): nothing is "
                "written or deleted through it. Put the files themselves there, or choose another "
                "path for the run; the run directory itself may be a link."
            )


def make_directory(path: Path, *, inside: Path) -> None:
    """Creates ``path`` in the directory ``inside`` where it is missing.

    Raises:
        RunDirectoryError: It cannot be created, is a file, or is reached through a link.
    """
    refuse_links(path, inside)
    with naming("create the directory", path):
        path.mkdir(exist_ok=True)


def write_atomically(path: Path, data: bytes, *, inside: Path) -> None:
    """Writes ``data`` to ``path``: readers see the old file or the whole new one, never a part.

    The bytes go to a temporary file beside ``path``, which is fsynced and renamed; the directory
    is fsynced too, so that the rename outlives a power cut.

    Args:
        path: the file.
        data: its contents.
        inside: the directory that the file must not leave through a link.

    Raises:
        RunDirectoryError: the directory is not writable, the disk is full, or a link leads out of
            ``inside``; an older file at ``path`` is left as it was, and no temporary file stays.
    """
    refuse_links(path, inside)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming("write", path):
        try:
            with open(temporary, "wb", opener=_open_no_link) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:  # Ctrl-C included: leave nothing half-written
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_directory(path.parent)


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


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
    """Deletes what killed writers left in ``directory``; nothing where there is no directory.

    Only the holder of the directory's lock may call it: the files of a live writer look alike.
    """
    with naming("clean", directory):
        if not directory.is_dir():
            return
        for path in directory.iterdir():
            if is_temporary(path.name) and not path.is_dir():
                path.unlink(missing_ok=True)
