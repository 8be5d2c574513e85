"""The record of a folder of normalized images: from what each was made, and how."""

from __future__ import annotations

import csv
import datetime
import errno
import io
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

NAME = "offsets.csv"
FIELDS = (
    "input",
    "output",
    "offset_a",
    "offset_b",
    "made_by",
    "input_bytes",
    "input_modified",
    "output_bytes",
    "output_modified",
)


class Record:
    """``offsets.csv`` of a folder: a line for each image, added as soon as the image is there.

    A killed run loses no line, and several runs can write to one folder: lines are only ever added, each at once. If
    an image was made several times, its last line counts.

    Args:
        folder: of the images.
        made_by: program, version and weights; an image made by others is not up to date.

    Raises:
        ValueError: the folder has a file of this name that is no such record.
        OSError: it cannot be read or written.
    """

    def __init__(self, folder: Path, made_by: str) -> None:
        self.folder = folder
        self.made_by = made_by
        self.path = folder / NAME
        self.lines: dict[str, list[str]] = {}
        # Binary, as Windows would translate line ends.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
        self.handle = os.open(self.path, flags, 0o666)
        try:
            self._read()
        except BaseException:
            os.close(self.handle)
            raise

    def _read(self) -> None:
        with self.path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            try:
                rows = csv.reader(file)
                first = next(rows, None)
                if first is not None and tuple(first) != FIELDS:
                    raise ValueError(f"expected the header {','.join(FIELDS)}, got {','.join(first)[:200]}")
                for row in rows:
                    if len(row) == len(FIELDS):
                        self.lines[row[1]] = row
            except (csv.Error, ValueError) as error:
                raise ValueError(
                    f"{self.path} is not a record of this version, and is not replaced: move it, or choose another "
                    f"output folder ({error})"
                ) from error
        if first is None:
            self._append(FIELDS)
        elif not self._ends_a_line():
            self._write(b"\n")

    def _ends_a_line(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self.handle)

    def is_current(self, path: Path, output: Path) -> bool:
        """Whether ``output`` is there as it was made, from ``path`` as it is now, in the same way.

        Files are told by their size and the time of their last change.
        """
        line = self.lines.get(self._name(output))
        if line is None or not output.is_file():
            return False
        return [line[0], *line[4:]] == [*self.source(path), *_state(output)]

    def source(self, path: Path) -> tuple[str, str, str, str]:
        """What an image would be made from and by: path, ``made_by``, bytes, and time of the last change.

        Raises:
            OSError: there is no such file.
        """
        return str(path), self.made_by, *_state(path)

    def add(self, source: tuple[str, str, str, str], output: Path, a: float, b: float) -> None:
        """Adds the line of an image that was written, with the offset that was taken from it."""
        path, *how = source
        line = [path, self._name(output), f"{a:.3f}", f"{b:.3f}", *how, *_state(output)]
        self._append(line)
        self.lines[self._name(output)] = line

    def offset(self, output: Path) -> tuple[float, float]:
        """The (a*, b*) that was taken away from an image that was made."""
        line = self.lines[self._name(output)]
        return float(line[2]), float(line[3])

    def _name(self, output: Path) -> str:
        return output.relative_to(self.folder).as_posix()

    def _append(self, row: Sequence[str]) -> None:
        line = io.StringIO(newline="")
        csv.writer(line, lineterminator="\n").writerow(row)
        self._write(line.getvalue().encode(errors="surrogateescape"))

    def _write(self, line: bytes) -> None:
        size = os.fstat(self.handle).st_size
        written = os.write(self.handle, line)
        if written < len(line):
            os.ftruncate(self.handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def _state(path: Path) -> tuple[str, str]:
    """Bytes, and time of the last change in UTC, to the nanosecond."""
    state = path.stat()
    seconds, nanoseconds = divmod(state.st_mtime_ns, 10**9)
    moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=seconds)
    return str(state.st_size), f"{moment.isoformat()}.{nanoseconds:09}Z"
