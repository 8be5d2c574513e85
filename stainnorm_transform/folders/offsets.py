"""Offsets that are given instead of estimated."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class Offsets:
    """Given (a*, b*) offsets: one for all files, or those of a CSV file, which may be an ``offsets.csv``."""

    for_all: tuple[float, float] | None = None
    by_path: dict[str, tuple[float, float]] = field(default_factory=dict)
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Offsets:
        """Reads ``A,B``, or the CSV file of this name, with columns input, offset_a and offset_b.

        Raises:
            ValueError: it is neither, or a number is not finite.
            OSError: the file cannot be read.
        """
        try:
            a, b = text.split(",")
            return cls(for_all=_pair(a, b))
        except ValueError as error:
            if not os.path.exists(text):
                raise ValueError(
                    f"expected two finite numbers, as in --offset=3.5,-2, or a CSV file that is there, got {text!r}"
                ) from error
        found: dict[str, tuple[float, float]] = {}
        # Spreadsheets begin with a mark.
        with open(text, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            try:
                missing = {"input", "offset_a", "offset_b"} - set(reader.fieldnames or ())
                if missing:
                    raise ValueError(f"expected columns input, offset_a and offset_b, got no {min(missing)}")
                for row in reader:
                    pair = _pair(row["offset_a"], row["offset_b"])
                    is_name = os.path.basename(row["input"]) == row["input"]
                    found[row["input"] if is_name else os.path.realpath(row["input"])] = pair
            except (TypeError, ValueError, csv.Error) as error:
                raise ValueError(f"{text}, line {reader.line_num}: {error}") from error
        return cls(by_path=found, name=text)

    def of(self, path: Path) -> tuple[float, float]:
        """The offset of a file; in a CSV file that of its path, or else of its name where no folder is given.

        Raises:
            ValueError: it has none.
        """
        if self.for_all is not None:
            return self.for_all
        for key in (os.path.realpath(path), path.name):
            if key in self.by_path:
                return self.by_path[key]
        raise ValueError(f"it is not in {self.name}")


def _pair(a: str, b: str) -> tuple[float, float]:
    pair = float(a), float(b)
    if not torch.tensor(pair).isfinite().all():
        raise ValueError(f"expected two finite numbers, got {a}, {b}")
    return pair
