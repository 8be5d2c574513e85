"""The command ``stainnorm``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from stainnorm_transform import __version__
from stainnorm_transform.files import printable

COMMANDS = {
    "normalize": "give images and slides the colors of the target",
    "train": "make weights for your own target",
    "list": "show the shipped weights",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0 done, 1 some files failed, 2 nothing could be done."""
    for stream in (sys.stdout, sys.stderr):
        # File names may hold what the terminal's encoding lacks.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser(arguments).parse_args(arguments)
    try:
        status: int = options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"stainnorm: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stainnorm: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="stainnorm", description="Stain normalization of H&E images with ColorNormNet."
    )
    parser.add_argument("--version", action="version", version=f"stainnorm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name in arguments[:1]:
            # Only the command that runs is imported, as torch takes seconds.
            importlib.import_module(f"stainnorm_transform.cli.{name}").add_arguments(command)
    return parser
