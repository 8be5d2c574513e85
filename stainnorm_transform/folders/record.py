"""The record of a folder of normalized images: from what each was made, and how."""

from __future__ import annotations

import csv
import errno
import io
import math
import os
import stat
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NamedTuple

from stainnorm_transform.files import check_regular, locked, version

NAME = "offsets.csv"
# The color map, by rows: for a* and for b* the offset of a usual color of tissue, and how it differs 20 units of L*, a*
# and b* away.
MAP_FIELDS = ("map_a", "map_a_by_l", "map_a_by_a", "map_a_by_b", "map_b", "map_b_by_l", "map_b_by_a", "map_b_by_b")
# What the map was estimated from: how many tiles with tissue (of an image 1, or 0 without tissue), and the standard
# error of the offset in Lab units. Both are empty where nothing was estimated; an image has no standard error.
BASIS_FIELDS = ("tiles", "tiles_left_out", "standard_error")
FIELDS = (
    "input",
    "output",
    "offset_a",
    "offset_b",
    *MAP_FIELDS,
    *BASIS_FIELDS,
    "made_by",
    "input_bytes",
    "input_mtime_ns",
    "output_bytes",
    "output_mtime_ns",
)
_MADE_BY = FIELDS.index("made_by")
# Of version 0.1.0.
_HEADER_OF_OFFSETS = ",".join(name for name in FIELDS if name not in MAP_FIELDS + BASIS_FIELDS)
Source = tuple[str, str, str, str]
# Before the number of damaged parts of a slide that became white, at the end of ``made_by``.
DAMAGED = "damaged"


class Basis(NamedTuple):
    """What a map was estimated from: nothing, where it was given.

    Attributes:
        tiles: how many tiles with tissue; of an image 1, or 0.
        left_out: how many more tiles of a slide have tissue, but do not count.
        error: the standard error of the offset of a slide, in Lab units.
    """

    tiles: int | None = None
    left_out: int | None = None
    error: float | None = None


NOTHING = Basis()


def is_of_results(folder: Path) -> bool:
    """Whether a folder has a record, so that its images are results."""
    try:
        check_regular(folder / NAME)
        with (folder / NAME).open("rb") as file:
            return file.readline(1000).rstrip().decode(errors="replace") in (",".join(FIELDS), _HEADER_OF_OFFSETS)
    except (OSError, ValueError):
        return False


class Record:
    """``offsets.csv`` of a folder: a line for each image, added before the image gets its name.

    A killed run loses no line, and several runs can write to one folder: lines are only ever added, each at once. If
    an image was made several times, its last line counts. Within ``with`` lines can be added.

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
        self.handle = -1
        # Of several threads; other processes are kept out by the lock of the file.
        self.adding = threading.Lock()
        self.reread()

    def reread(self) -> None:
        """Reads the lines that others have added."""
        if os.path.lexists(self.path):
            self._read()

    def _read(self) -> None:
        with open(self._open(os.O_RDONLY), newline="", encoding="utf-8", errors="surrogateescape") as file:
            try:
                rows = csv.reader(file)
                first = next(rows, None)
                if first is not None and tuple(first) != FIELDS:
                    raise ValueError(f"expected the header {','.join(FIELDS)}, got {','.join(first)[:200]}")
                for row in rows:
                    # Others are of a full disk.
                    if len(row) == len(FIELDS):
                        self.lines[row[1]] = row if _is_number(row[2]) and _is_number(row[3]) else [""] * len(FIELDS)
            except (csv.Error, ValueError) as error:
                raise ValueError(
                    f"{self.path} is not a record of this version, and is not replaced: move it, or choose another "
                    f"output folder ({error})"
                ) from error

    def _open(self, flags: int) -> int:
        # No links, as lines would be added to what they lead to, and no pipes; Windows has neither, but two line ends.
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(self.path, flags, 0o666)
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
            os.close(handle)
            raise ValueError(f"{self.path} is not a file of its own, and is not replaced: move it")
        return handle

    def __enter__(self) -> Record:
        self.handle = self._open(os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            with locked(self.handle):
                if not (size := os.fstat(self.handle).st_size):
                    self._append(FIELDS)
                else:
                    os.lseek(self.handle, size - 1, os.SEEK_SET)
                    if os.read(self.handle, 1) != b"\n":
                        self._write(b"\r\n")
        except BaseException:
            os.close(self.handle)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self.handle)

    def has(self, output: Path) -> bool:
        """Whether there is a line for this file: whether it is a result, and may be replaced."""
        return self._name(output) in self.lines

    def other_weights(self, output: Path) -> str | None:
        """The target and digest of the weights that made a result, if they are others than these."""
        # "stainnorm", version, target, digest, and what else it depends on.
        ours, theirs = (text.partition(" ")[2].partition(" ")[2] for text in (self.made_by, self._made_by(output)))
        return None if f"{theirs} ".startswith(f"{ours} ") else theirs

    def _made_by(self, output: Path) -> str:
        return self.lines[self._name(output)][_MADE_BY]

    def damaged(self, output: Path) -> int:
        """How many damaged parts of a slide became white in a result."""
        words = self._made_by(output).split() if self.has(output) else []
        return int(words[-1]) if words[-2:-1] == [DAMAGED] and words[-1].isdecimal() else 0

    def is_current(self, path: Path, output: Path, how: str = "") -> bool:
        """Whether ``output`` is there as it was made, from ``path`` as it is now, in the same way.

        Files are told by their size and the time of their last change.
        """
        line = self.lines.get(self._name(output))
        if line is None or not output.is_file():
            return False
        return [line[0], *line[_MADE_BY:]] == [*self.source(path, how), *_state(output)]

    def source(self, path: Path, how: str = "") -> Source:
        """What an image would be made from and by: path, ``made_by`` and ``how``, bytes, and time of the last change.

        Raises:
            OSError: there is no such file.
        """
        return str(path), self.made_by + how, *_state(path)

    def add(
        self,
        source: Source,
        output: Path,
        offset: Iterable[float],
        color_map: Iterable[float],
        temporary: Path,
        how: str = "",
        basis: Basis = NOTHING,
        beside: Mapping[Path, Path] = MappingProxyType({}),
    ) -> None:
        """Adds the line of an image that lies in ``temporary``, with what was taken away, and renames it to ``output``.

        What only its making has shown of it, ``how``, is added to ``made_by``. ``basis`` is what the
        map was estimated from. Files ``beside`` it are renamed first. Of several runs that make an image, the
        last line is that of the file that stays.
        """
        path, made_by, *state = source
        name = self._name(output)
        numbers = [f"{value:.3f}" for value in offset] + [f"{value:.9g}" for value in color_map]
        tiles, left_out, error = basis
        numbers += ["" if count is None else str(count) for count in (tiles, left_out)]
        numbers.append("" if error is None else f"{error:.3f}")
        line = [path, name, *numbers, made_by + how, *state, *_state(temporary)]
        with self.adding, locked(self.handle):
            self._append(line)
            for made, final in {**beside, temporary: output}.items():
                made.replace(final)
        self.lines[name] = line

    def offset(self, output: Path) -> tuple[float, float]:
        """The (a*, b*) that was taken away from an image that was made."""
        line = self.lines[self._name(output)]
        return float(line[2]), float(line[3])

    def color_map(self, output: Path) -> list[float]:
        """The map that was taken away, by rows: see ``MAP_FIELDS``."""
        return [float(text) for text in self._named(output, MAP_FIELDS)]

    def basis(self, output: Path) -> Basis:
        """What a map was estimated from."""
        *counts, error = self._named(output, BASIS_FIELDS)
        tiles, left_out = (int(text) if text.isdecimal() and len(text) < 10 else None for text in counts)
        return Basis(tiles, left_out, float(error) if _is_number(error) else None)

    def _named(self, output: Path, fields: tuple[str, ...]) -> list[str]:
        start = FIELDS.index(fields[0])
        return self.lines[self._name(output)][start : start + len(fields)]

    def _name(self, output: Path) -> str:
        return output.relative_to(self.folder).as_posix()

    def _append(self, row: Sequence[str]) -> None:
        line = io.StringIO(newline="")
        csv.writer(line).writerow(row)
        self._write(line.getvalue().encode(errors="surrogateescape"))

    def _write(self, line: bytes) -> None:
        size = os.fstat(self.handle).st_size
        try:
            written = os.write(self.handle, line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if written < len(line):
            os.ftruncate(self.handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _state(path: Path) -> tuple[str, str]:
    size, changed = version(path.stat())
    return str(size), str(changed)
