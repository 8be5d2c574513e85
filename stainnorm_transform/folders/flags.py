"""Which files of a folder to look at, and why."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stainnorm_transform.files import printable
from stainnorm_transform.folders.outcome import Outcome
from stainnorm_transform.folders.record import Record
from stainnorm_transform.slides import is_slide

# Estimates from fewer tiles of a slide are off by more than what eyes just notice: see the table in examples/SLIDES.md.
FEW_TILES = 16
# In Lab units. Of 20 estimates 19 are then within 1.7 Lab units, less than the 2.3 that eyes just notice (Mahy et al.,
# 1994). Slides with much tissue have 0.1 to 0.2.
LARGE_ERROR = 1.0
# More of the tiles were left out as far from most others: pen, dirt and folds seldom cover as much.
LEFT_OUT = 0.2
# From the median of a folder, in Lab units, twice what eyes just notice; and this many times as far as the files of the
# folder usually are, which of normally distributed offsets 1 in 60,000 is.
FAR, FAR_SPREAD = 5.0, 4.0
# The median of fewer files says little.
FOLDER_FILES = 8

# What each flag means, and what to do.
FLAGS = {
    "failed": "It was not normalized, and its message says why. Mend or convert it; the same command then does what is "
    "missing.",
    "damaged": "Parts that could not be decoded became white. Copy or scan it again, and normalize it again.",
    "no tissue": "No tissue was found, so the colors are as they were. Leave blank files out. If you see tissue, "
    "it may be very pale, very dark, gray or out of focus: take an offset from a similar file, by --offset.",
    "few tiles": f"The color map of the slide rests on fewer than {FEW_TILES} tiles with tissue, of 128 µm a side "
    "(usually there are up to 192), so it may be off by a few Lab units. If the colors look wrong, take the offset of "
    "a similar slide, by --offset.",
    "tiles disagree": f"More than {LEFT_OUT:.0%} of the tiles with tissue differ so much from most others that they "
    f"did not count, or the standard error of the offset, by those that count, is above {LARGE_ERROR:g} Lab unit. Look "
    "for pen, folds, blood, several stains or kinds of tissue, or an immunostain.",
    "far": f"The offset is more than {FAR:g} Lab units from the median of its folder, and more than {FAR_SPREAD:g} "
    f"times as far as is usual there (only in folders of {FOLDER_FILES} files or more). It may come from another lab "
    "or scanner, be another stain, or have pen or blood on it. If it looks right, nothing needs to be done.",
}


@dataclass(frozen=True)
class Entry:
    """What is known of a file of a run.

    Attributes:
        name: of the file, below the input folder; nothing in it controls a terminal or a page.
        folder: that of ``name``, empty for the top one.
        is_slide: or else it is an image.
        offset: what was taken away, a*, b* in Lab units; None if it failed.
        tiles: how many tiles with tissue the map was estimated from; None if it was not.
        left_out: how many more tiles of a slide have tissue, but did not count.
        standard_error: of the offset, in Lab units; None if there is none.
        damaged: how many parts became white.
        message: what went wrong, or what is to be said of it.
    """

    name: str
    folder: str
    is_slide: bool
    offset: tuple[float, float] | None = None
    tiles: int | None = None
    left_out: int | None = None
    standard_error: float | None = None
    damaged: int = 0
    message: str = ""


class Usual(NamedTuple):
    """The usual offset of a folder: the median a*, b*, and the distance in Lab units from which on others are far."""

    a: float
    b: float
    limit: float


def entry_of(path: Path, output: Path, outcome: Outcome, made: Record) -> Entry:
    """What the record and the run know of a file."""
    below = output.relative_to(made.folder).with_name(path.name)
    folder = "" if below.parent == Path() else printable(below.parent.as_posix())
    name = printable(below.as_posix())
    message = outcome.error or outcome.note
    for folder_of_this_machine in (made.folder, path.parent):
        message = message.replace(f"{folder_of_this_machine}{os.sep}", "")
    message = printable(message)
    if outcome.error:
        return Entry(name, folder, is_slide(path), message=message)
    return Entry(name, folder, is_slide(path), made.offset(output), *made.basis(output), made.damaged(output), message)


def usual_offsets(entries: Iterable[Entry]) -> dict[str, Usual]:
    """Of each folder with enough estimates: its usual offset."""
    offsets = defaultdict(list)
    for entry in entries:
        if entry.offset and entry.tiles:
            offsets[entry.folder].append(entry.offset)
    found = {}
    for folder, known in offsets.items():
        if len(known) >= FOLDER_FILES:
            a, b = (statistics.median(values) for values in zip(*known, strict=True))
            spread = statistics.median(_distance(offset, (a, b)) for offset in known)
            found[folder] = Usual(a, b, max(FAR, FAR_SPREAD * spread))
    return found


def flags_of(entry: Entry, usual: Mapping[str, Usual]) -> list[str]:
    """Why to look at a file: some of ``FLAGS``."""
    if entry.offset is None:
        return ["failed"]
    near = usual.get(entry.folder)
    found = {
        "damaged": entry.damaged > 0,
        "no tissue": entry.tiles == 0,
        "few tiles": entry.is_slide and entry.tiles is not None and 0 < entry.tiles < FEW_TILES,
        "tiles disagree": _disagree(entry),
        "far": bool(near and entry.tiles and _distance(entry.offset, (near.a, near.b)) > near.limit),
    }
    return [flag for flag, is_so in found.items() if is_so]


def _disagree(entry: Entry) -> bool:
    tiles, left_out = entry.tiles or 0, entry.left_out or 0
    return left_out > LEFT_OUT * (tiles + left_out) or (entry.standard_error or 0) > LARGE_ERROR


def _distance(first: tuple[float, float], second: tuple[float, float]) -> float:
    return ((first[0] - second[0]) ** 2 + (first[1] - second[1]) ** 2) ** 0.5
