"""Files: whole or not at all, regular ones only, and their names on a terminal."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX, SUFFIX = ".stainnorm-", ".part"
# It can only be read by setting it, which other threads would notice later.
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, renamed to ``path`` when the block ends and removed when it raises.

    Its suffix is none that anybody looks for. What killed processes left in the folder is removed, once.
    """
    path = Path(path)
    remove_leftovers(path.parent)
    handle, temporary = _make(path.parent)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        if fcntl:
            os.close(handle)


def _make(folder: Path) -> tuple[int, Path]:
    """A new file, locked for as long as its process lives, where the file system can."""
    while True:
        handle, name = tempfile.mkstemp(prefix=PREFIX, suffix=SUFFIX, dir=folder)
        if not fcntl:
            os.close(handle)  # Windows renames no open file.
            return handle, Path(name)
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(name), os.fstat(handle)):
                return handle, Path(name)
        os.close(handle)  # Another process took it for a leftover before it was locked.


@functools.cache
def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files in a folder whose process is no more; only looks once."""
    for path in folder.glob(f"{PREFIX}*{SUFFIX}") if fcntl else ():
        with contextlib.suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextmanager
def locked(handle: int) -> Iterator[None]:
    """Keeps others who lock this open file waiting, where the file system can."""
    if fcntl:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if fcntl:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)


def check_regular(path: Path) -> None:
    """Raises OSError where nothing can be read, ValueError for a pipe or a device, which might never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("expected a regular file, got a folder, pipe or device")


def printable(text: str) -> str:
    """One line of text from file names and files, in which nothing controls the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
