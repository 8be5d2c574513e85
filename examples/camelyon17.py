"""Reads the CAMELYON17 images that the other examples train on and measure."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stainnorm_transform.cli.options import path_name

CENTERS = range(5)
CENTER_FOLDERS = tuple(f"camelyon17/center_{center}" for center in CENTERS)


def missing(data: Path, needed: Sequence[str]) -> str | None:
    """What is to be said if a folder lacks some of these subfolders."""
    absent = [name for name in needed if not (data / name).is_dir()]
    if not absent:
        return None
    return (
        f"expected a folder with {', '.join(absent)}, got {str(data)!r}: Data in weights/README.md says which "
        "images these are and where to get them; give their folder as --data or STAINNORM_DATA"
    )


def add_data_option(parser: argparse.ArgumentParser, needed: Sequence[str] = CENTER_FOLDERS) -> None:
    """Adds ``--data``, a folder that must have the subfolders that are needed."""

    def folder(text: str) -> Path:
        path = path_name(text)
        if absent := missing(path, needed):
            raise argparse.ArgumentTypeError(absent)
        return path

    parser.add_argument(
        "--data",
        type=folder,
        default=os.environ.get("STAINNORM_DATA", "../shared/data"),
        help="folder of the images, see Data in weights/README.md (default: $STAINNORM_DATA or ../shared/data)",
    )


def read(path: Path) -> Tensor:
    """An image file as uint8, (3, H, W)."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def read_center(data: Path, center: int) -> dict[str, Tensor]:
    """The images of a center by file name."""
    return {path.name: read(path) for path in sorted((data / "camelyon17" / f"center_{center}").iterdir())}
