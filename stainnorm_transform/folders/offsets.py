"""Shifts that are given instead of estimated."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stainnorm_transform.color import as_map
from stainnorm_transform.folders.record import MAP_FIELDS, Basis


class Shift(NamedTuple):
    """What is taken away from an image or a slide.

    Attributes:
        offset: from the mean color of its tissue, (2,): a*, b* in Lab units.
        color_map: the map (2, 4), see ``color.shift_ab``.
        basis: what it was estimated from.
    """

    offset: Tensor
    color_map: Tensor
    basis: Basis = Basis()

    @classmethod
    def of_offset(cls, a: float, b: float) -> Shift:
        """The same offset for all colors."""
        offset = torch.tensor([a, b], dtype=torch.float32)
        return cls(offset, as_map(offset))


@dataclass(frozen=True)
class Offsets:
    """Given shifts: one offset for all files, or those of a CSV file, which may be an ``offsets.csv``."""

    for_all: Shift | None = None
    by_path: dict[str, Shift] = field(default_factory=dict)
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Offsets:
        """Reads ``A,B``, or the CSV file of this name, with columns input, offset_a and offset_b.

        Where it also has the columns of a map, as an ``offsets.csv`` does, and they are filled, the map is taken.

        Raises:
            ValueError: it is neither, or a number is not finite.
            OSError: the file cannot be read.
        """
        try:
            a, b = text.split(",")
            return cls(for_all=Shift.of_offset(*_numbers(a, b)))
        except ValueError as error:
            if not os.path.exists(text):
                raise ValueError(
                    f"expected two finite numbers, as in --offset=3.5,-2, or a CSV file that is there, got {text!r}"
                ) from error
        found: dict[str, Shift] = {}
        # Spreadsheets begin with a mark.
        with open(text, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            try:
                missing = {"input", "offset_a", "offset_b"} - set(reader.fieldnames or ())
                if missing:
                    raise ValueError(f"expected columns input, offset_a and offset_b, got no {min(missing)}")
                for row in reader:
                    is_name = os.path.basename(row["input"]) == row["input"]
                    found[row["input"] if is_name else os.path.realpath(row["input"])] = _shift(row)
            except (TypeError, ValueError, csv.Error) as error:
                raise ValueError(f"{text}, line {reader.line_num}: {error}") from error
        return cls(by_path=found, name=text)

    def of(self, path: Path) -> Shift:
        """The shift of a file; in a CSV file that of its path, or else of its name where no folder is given.

        Raises:
            ValueError: it has none.
        """
        if self.for_all is not None:
            return self.for_all
        for key in (os.path.realpath(path), path.name):
            if key in self.by_path:
                return self.by_path[key]
        raise ValueError(f"{self.name} has no line for it: neither its full path nor its name is an input there")

    def check(self, paths: Iterable[Path]) -> None:
        """Raises ValueError where a name without a folder would stand for several files."""
        named: dict[str, Path] = {}
        for path in paths:
            if os.path.realpath(path) in self.by_path or path.name not in self.by_path:
                continue
            if path.name in named:
                raise ValueError(
                    f"{self.name} has {path.name} without a folder, which could be {named[path.name]} or {path}: give "
                    "full paths"
                )
            named[path.name] = path


def _shift(row: Mapping[str, str | None]) -> Shift:
    a, b = row["offset_a"], row["offset_b"]
    of_map = [row.get(name) for name in MAP_FIELDS]
    if not any(of_map):
        return Shift.of_offset(*_numbers(a, b))
    if not all(of_map):
        raise ValueError(f"expected all columns of the map, {MAP_FIELDS[0]} to {MAP_FIELDS[-1]}, or none of them")
    color_map = torch.tensor(_numbers(*of_map), dtype=torch.float32)
    return Shift(torch.tensor(_numbers(a, b), dtype=torch.float32), color_map.view(2, 4))


def _numbers(*texts: str | None) -> list[float]:
    values = [float(text) if text else math.nan for text in texts]
    if not torch.tensor(values).isfinite().all():
        raise ValueError(f"expected finite numbers, got {', '.join(text or 'nothing' for text in texts)}")
    return values
