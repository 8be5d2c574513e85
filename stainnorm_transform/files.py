"""Files: whole or not at all, regular ones only, and their names on a terminal."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX, SUFFIX = ".stainnorm-", ".part"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, renamed to ``path`` when the block ends and removed when it raises."""
    with temporary_beside(path) as temporary:
        yield temporary
        temporary.replace(path)


@contextmanager
def temporary_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new file beside ``path``, which is removed at the end where it has not been renamed.

    Its suffix is none that anybody looks for. What killed processes left in the folder is removed, once.
    """
    folder = Path(path).parent
    remove_leftovers(folder)
    handle, temporary = _make(folder)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        if fcntl:
            os.close(handle)


def _make(folder: Path) -> tuple[int, Path]:
    """A new file, locked for as long as its process lives, where the file system can."""
    while True:
        path = folder / f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if not fcntl:
            os.close(handle)  # Windows renames no open file.
            return handle, path
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(handle)):
                return handle, path
        os.close(handle)  # Another process took it for a leftover before it was locked.


def version(state: os.stat_result) -> tuple[int, int]:
    """Size and time of the last change of a file in ns: the same on other machines, unlike its number."""
    return state.st_size, state.st_mtime_ns


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


def one_line(error: Exception) -> str:
    """What an error says, in one line, or its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """One line of text from file names and files, in which nothing controls the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
