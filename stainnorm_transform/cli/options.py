"""Options that several commands and examples have."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_inputs(parser: argparse.ArgumentParser, what: str = "image") -> None:
    """Adds ``inputs``, for ``plan.find``."""
    parser.add_argument(
        "inputs", nargs="+", type=path_name, metavar="INPUT", help=f"{what}, or folder of them, with its subfolders"
    )


def path_name(text: str) -> Path:
    """A path, but not that of the current folder by an empty name: a variable of the shell that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("expected a file or folder, got an empty name")
    return Path(text)


def file_name(text: str) -> Path:
    """The path of a file that is there."""
    path = path_name(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"expected a file that is there, got {text!r}")
    return path


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``, for ``choose_device``."""
    parser.add_argument(
        "--device", help="where to compute: cpu, cuda, cuda:1 (default: cuda if there is one, else cpu)"
    )
