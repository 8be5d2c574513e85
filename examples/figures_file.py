"""The JSON file that an example writes its figures to after each run, and goes on with after an interruption."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from stainnorm_transform.files import replacing

Settings = dict[str, Any]


def check_outputs(figures: Path | None, picture: Path | None) -> None:
    """Raises ValueError where what is measured could not be written."""
    for path in (figures, picture):
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f"expected a folder that is there for {path}, got none: make it first")
    if picture and not importlib.util.find_spec("matplotlib"):
        raise ValueError('expected matplotlib for --plot, got none: run pip install -e ".[evidence]"')


def earlier_figures(path: Path, settings: Settings, key: str) -> Any:
    """The figures that an earlier call wrote to a file, under a key.

    Raises:
        ValueError: this script did not write the file, or did so with other settings.
    """
    try:
        content = json.loads(path.read_text())
        before, found = content["settings"], content[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected figures that this script wrote, got {path}: give another --json") from error
    if other := [name for name in settings if before.get(name) != settings[name]]:
        raise ValueError(f"expected {path} to have the same {' and '.join(other)}, got others: give another --json")
    return found


def earlier_runs(path: Path | None, resume: bool, settings: Settings) -> list[dict[str, Any]]:
    """The runs that are in the ``--json`` file. Without ``--resume`` there must be no such file.

    Raises:
        ValueError: as ``earlier_figures``, or there is a file and no ``--resume``, or the other way round.
    """
    if resume and path is None:
        raise ValueError("expected --json with --resume: the file of the runs that are done")
    if path is None or not path.exists():
        return []
    if not resume:
        raise ValueError(f"expected a file that is not there yet, got {path}: add --resume to go on, or take it away")
    return earlier_figures(path, settings, "runs")


def write_figures(path: Path, settings: Settings, key: str, figures: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"settings": settings, key: figures}) + "\n")
