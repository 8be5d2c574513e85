"""Files: whole or not at all, regular ones only, and their names on a terminal."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX, SUFFIX = ".stainnorm-", ".part"
# A file younger than this many seconds may not be locked yet.
LEFTOVER_AGE = 5.0


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, renamed to ``path`` when the block ends and removed when it raises.

    Its suffix is none that anybody looks for. What a killed process left in the folder is removed.
    """
    path = Path(path)
    _remove_leftovers(Path(os.path.realpath(path.parent)))
    handle, name = tempfile.mkstemp(prefix=PREFIX, suffix=SUFFIX, dir=path.parent)
    temporary = Path(name)
    try:
        _lock(handle)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        if fcntl:
            os.close(handle)


def _lock(handle: int) -> None:
    """Marks a temporary file as in use for as long as its process lives, where the file system can."""
    if not fcntl:
        os.close(handle)  # Windows renames no open file.
        return
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@functools.cache
def _remove_leftovers(folder: Path) -> None:
    """Removes temporary files whose process is no more, once for each folder."""
    for path in folder.glob(f"{PREFIX}*{SUFFIX}") if fcntl else ():
        with contextlib.suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - path.stat().st_mtime > LEFTOVER_AGE:
                path.unlink()


def check_regular(path: Path) -> None:
    """Raises OSError where nothing can be read, ValueError for a pipe or a device, which might never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("expected a regular file, got a folder, pipe or device")


def printable(text: str) -> str:
    """Text from file names and files, in which nothing controls the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
