"""Reads the CAMELYON17 images that the other examples train on and measure."""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CENTERS = range(5)


def _folder(text: str) -> Path:
    if not text or not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder: set STAINNORM_DATA or --data, see weights/README.md")
    return Path(text)


def add_data_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=_folder,
        default=os.environ.get("STAINNORM_DATA", "../shared/data"),
        help="folder with camelyon17/center_0 ... center_4 (default: $STAINNORM_DATA or ../shared/data)",
    )


def read(path: Path) -> Tensor:
    """An image file as uint8, (3, H, W)."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def read_center(data: Path, center: int) -> dict[str, Tensor]:
    """The images of a center by file name."""
    return {path.name: read(path) for path in sorted((data / "camelyon17" / f"center_{center}").iterdir())}
