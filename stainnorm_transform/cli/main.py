"""The command ``stainnorm``."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from stainnorm_transform import __version__, weights
from stainnorm_transform.cli import normalize, train
from stainnorm_transform.files import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0 done, 1 some files failed, 2 nothing could be done."""
    for stream in (sys.stdout, sys.stderr):
        # File names may hold what the terminal's encoding lacks.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    options = _parser().parse_args(arguments)
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


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="stainnorm", description="Stain normalization of H&E images with ColorNormNet."
    )
    parser.add_argument("--version", action="version", version=f"stainnorm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    normalize.add_parser(commands)
    train.add_parser(commands)

    listing = commands.add_parser("list", help="show the shipped weights", description="Shows the shipped weights.")
    listing.set_defaults(run=_list)
    return parser


def _list(options: argparse.Namespace) -> int:
    for name in weights.names():
        default = " (default)" if name == weights.DEFAULT else ""
        if name in weights.ALIASES:
            print(f"{name}{default}: another name of {weights.ALIASES[name]}")
            continue
        loaded = weights.load(name)
        print(f"{name}{default}: {loaded.data.get('summary', '')}")
        print(f"    {loaded.metrics.get('summary', '')}")
    return 0
