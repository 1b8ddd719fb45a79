"""Atomic file writes: if a process stops, the file has either the old or the new content."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

try:
    import fcntl

    _HAS_LOCKS = True
except ImportError:  # Windows
    _HAS_LOCKS = False

__all__ = ["atomic_savefig", "atomic_write", "atomic_write_text"]


def atomic_write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let ``write`` fill a file in the same folder, and put that in the place of ``path``.

    Any number of processes and threads may write at once: each has a file with a name that nobody
    else has, and the last to finish wins. A symbolic link stays, and what it points to is replaced.
    The permissions are those of the file that was there, or those that the umask gives. What a
    writer of this path has left behind that was killed is removed by the next.

    Args:
        path: The file, in a folder that exists.
        write: Called with an empty file, open for binary writing, which it leaves open.

    Raises:
        OSError: If the folder cannot be written to, or if ``path`` is there and no regular file.
            Whatever ``write`` raises is passed on. In all cases the old file is as it was.
    """
    target = Path(os.path.realpath(path))
    mode = None
    with contextlib.suppress(FileNotFoundError):
        mode = target.stat().st_mode
    if mode is not None and not stat.S_ISREG(mode):  # a device would be replaced by a file
        error = IsADirectoryError if stat.S_ISDIR(mode) else FileExistsError
        raise error(f"path={str(path)!r} is there and no regular file. Give another name.")
    _remove_abandoned(target)
    partial, file = _create_partial(target)
    try:
        with file:
            write(file)
            file.flush()
            if mode is not None:
                partial.chmod(stat.S_IMODE(mode))
            os.fsync(file.fileno())
            if _HAS_LOCKS:
                partial.replace(target)  # still open, and so still locked
        if not _HAS_LOCKS:  # Windows renames no open file
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":  # the new name has to reach the disk as well; Windows opens no folders
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def atomic_write_text(path: Path, text: str) -> None:
    """Write text, in UTF-8 with the line ends that it has, as :func:`atomic_write` does."""
    atomic_write(path, lambda file: file.write(text.encode()))


def atomic_savefig(path: Path, figure: Any, dpi: int) -> None:
    """Write a figure of Matplotlib, in the format that the suffix names and PNG by default."""
    fmt = path.suffix[1:] or "png"
    atomic_write(path, lambda file: figure.savefig(file, dpi=dpi, format=fmt))


def _create_partial(target: Path) -> tuple[Path, IO[bytes]]:
    """Make a new file next to ``target``, locked for as long as it is open."""
    while True:
        partial = target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}.tmp")
        descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        file = os.fdopen(descriptor, "w+b")
        # Another writer may take it for abandoned before the lock is there: then it is gone.
        if _lock(file) is not False and partial.exists():
            return partial, file
        file.close()


def _remove_abandoned(target: Path) -> None:
    """Remove the partial files of writers of ``target`` that were killed: nobody locks them."""
    for partial in target.parent.glob(f"{_prefix(target)}*.tmp"):
        # Of another user, or removed by another writer meanwhile: leave it.
        with contextlib.suppress(OSError), partial.open("rb+") as file:
            if _lock(file):
                partial.unlink()


def _lock(file: IO[bytes]) -> bool | None:
    """Lock an open file: whether that succeeded, None where the system has no such locks.

    The system drops the lock when the file is closed, also when the process is killed.
    """
    if not _HAS_LOCKS:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # of network file systems without locks
        return None
    return True


def _prefix(target: Path) -> str:
    """Name the partial files of a target: short, as its own name may be as long as is allowed."""
    return f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}."
