"""What became of a file."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

# Errors that every other file would meet as well.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Outcome:
    """What became of a file: nothing went wrong where ``error`` is empty.

    Args:
        error: what went wrong.
        number: the ``errno`` of it.
        note: what is to be said otherwise.
        seconds: how long it took.
        earlier: whether it was finished by an earlier run.
    """

    error: str = ""
    number: int | None = None
    note: str = ""
    seconds: float = 0.0
    earlier: bool = False

    @classmethod
    def of(cls, error: Exception, path: Path) -> Outcome:
        """The outcome of a file that failed."""
        # What stops the whole run names its file itself.
        number = error.errno if isinstance(error, OSError) else None
        return cls(error=str(error) if number in FULL else reason(error, path), number=number)


def reason(error: Exception, path: Path) -> str:
    """An error of a file in words, without the file's name where they begin with it."""
    if isinstance(error, OSError) and error.filename is not None and os.fspath(error.filename) == str(path):
        return str(error.strerror)
    return str(error) or type(error).__name__
