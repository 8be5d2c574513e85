"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Adds ``inputs``, for ``images.find``."""
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help="image, or folder of images, searched with its subfolders"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``, for ``choose_device``."""
    parser.add_argument(
        "--device", help="where to compute: cpu, cuda, cuda:1 (default: cuda if there is one, else cpu)"
    )
