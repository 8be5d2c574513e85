"""The JSON file that an example writes its figures to after each run, and goes on with after an interruption."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from stainnorm_transform.files import replacing, temporary_beside

Settings = dict[str, Any]


def check_outputs(figures: Path | None, picture: Path | None) -> None:
    """Raises ValueError where what is measured could not be written."""
    for path in filter(None, (figures, picture)):
        folder = path.absolute().parent
        try:
            if not folder.is_dir():
                raise ValueError(f"expected a folder that is there for {path}, got none: make it first")
            if path.is_dir():
                raise ValueError(f"expected a file, got the folder {path}: give another name")
            with temporary_beside(path):
                pass
        except OSError as error:
            raise ValueError(f"expected a folder that can be written to for {path}, got {folder} ({error})") from error
    if figures and picture and figures.absolute() == picture.absolute():
        raise ValueError(f"expected two files for --json and --plot, got {figures} for both")
    if picture and not importlib.util.find_spec("matplotlib"):
        raise ValueError('expected matplotlib for --plot, got none: run pip install -e ".[evidence]"')


def earlier_figures(path: Path, settings: Settings, key: str) -> Any:
    """The figures that an earlier call wrote to a file, under a key.

    Raises:
        ValueError: this script did not write the file, or did so with other settings.
    """
    try:
        content = json.loads(path.read_text())
        before, found = dict(content["settings"]), content[key]
        if not isinstance(found, dict) and not all(isinstance(run, dict) for run in found):
            raise TypeError(f"{key} is {type(found).__name__}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected figures that this script wrote, got {path}: give another --json") from error
    if other := [name for name in {**before, **settings} if before.get(name) != settings.get(name)]:
        raise ValueError(
            f"expected {path} to be of the same {' and '.join(other)}, got others or none: give another --json"
        )
    return found


def earlier_runs(path: Path | None, resume: bool, settings: Settings) -> list[dict[str, Any]]:
    """The runs that are in the ``--json`` file. Without ``--resume`` there must be no such file.

    Raises:
        ValueError: as ``earlier_figures``, or there is a file and no ``--resume``, or ``--resume`` and no ``--json``.
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
