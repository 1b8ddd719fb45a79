"""Writing files: whenever a process stops, the old content or the new one is there, whole."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

__all__ = ["atomic_write", "atomic_write_text"]


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file in the same folder, and put that in the place of ``path``.

    Any number of processes and threads may write at once: each has a file with a name that nobody
    else has, and the last to finish wins. A symbolic link stays, and what it points to is replaced.
    The permissions are those of the file that was there, or those that the umask gives.

    Args:
        path: The file, in a folder that exists.
        write: Called with the path of an empty file, which it may also replace.

    Raises:
        OSError: If the folder cannot be written to. Whatever ``write`` raises is passed on. In both
            cases the old file is as it was.
    """
    target = Path(os.path.realpath(path))
    # Short, so that a name as long as the file system allows can be written too.
    partial = target.with_name(f".{secrets.token_hex(8)}.tmp")
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        mode = (target if target.exists() else partial).stat().st_mode
        write(partial)
        partial.chmod(mode)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
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

    def write(partial: Path) -> None:
        partial.write_bytes(text.encode())

    atomic_write(path, write)
