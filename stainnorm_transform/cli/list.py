"""The command ``stainnorm list``."""

from __future__ import annotations

import argparse

from stainnorm_transform import weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command; it has no options."""
    parser.description = "Shows the shipped weights."
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints each name with what the weights were trained on and how good they are."""
    for name in weights.names():
        default = " (default)" if name == weights.DEFAULT else ""
        if name in weights.ALIASES:
            print(f"{name}{default}: another name of {weights.ALIASES[name]}")
            continue
        loaded = weights.load(name)
        print(f"{name}{default}: {loaded.data.get('summary', '')}")
        print(f"    {loaded.metrics.get('summary', '')}")
    return 0
