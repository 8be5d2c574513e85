"""The report of a run: a page with every file before and after, its offset, and what to look at."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import string
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from stainnorm_transform import __version__
from stainnorm_transform.color import shift_ab
from stainnorm_transform.files import printable, replacing
from stainnorm_transform.folders.flags import FLAGS, Entry, entry_of, flags_of, usual_offsets
from stainnorm_transform.folders.normalizer import FileNormalizer
from stainnorm_transform.folders.outcome import Outcome, reason
from stainnorm_transform.folders.overview import picture
from stainnorm_transform.resources import cores, in_order

NAME = "report.html"
# About 11 kB for a tile of 256 pixels full of tissue, three quarters of what JPEG takes.
_FORMAT: dict[str, Any] = {"format": "WEBP", "quality": 70}
# What every report has near its beginning.
_MARK = '<meta name="generator" content="stainnorm">'
# Nothing is loaded, sent or run but the page itself.
_POLICY = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; style-src {}; script-src {}"


def check(out: Path) -> None:
    """Raises ValueError if the folder has a file of the name of a report that is none."""
    path = out / NAME
    if not os.path.lexists(path):
        return
    if path.is_file():
        with path.open("rb") as file:
            if _MARK.encode() in file.read(1000):
                return
    raise ValueError(f"{path} is not a report of this command, and is not replaced: move it")


def write(
    normalizer: FileNormalizer,
    outputs: Mapping[Path, Path],
    outcomes: Mapping[Path, Outcome],
    workers: int | None = None,
    progress: Callable[[], object] = lambda: None,
) -> list[str]:
    """Writes ``report.html`` to the folder of the results.

    Pictures are made of the results as they lie there, so that what is seen is what was written; of a color profile,
    which has no pixels, by the map of the record. They are written one by one, as they are made.

    Args:
        normalizer: that of the run, whose record is up to date.
        outputs: the result of each file.
        outcomes: what became of each of them.
        workers: threads to make pictures with; default: as many as there are cores.
        progress: called after each file.

    Returns:
        Which files have no picture, and why.

    Raises:
        OSError: it cannot be written.
    """
    path = normalizer.settings.out / NAME
    entries = [entry_of(source, output, outcomes[source], normalizer.record) for source, output in outputs.items()]
    before, after = _page(_data(normalizer, entries, sum(outcome.earlier for outcome in outcomes.values())))
    missing = []

    def pictures(source: Path) -> str | Exception:
        try:
            return "" if outcomes[source].error else " ".join(map(_encoded, _pair(normalizer, source, outputs[source])))
        except Exception as error:  # A page without a picture is better than none.
            return error

    with _named(path), replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(before)
        with contextlib.closing(in_order(pictures, outputs, workers or cores())) as made:
            for number, (source, found) in enumerate(zip(outputs, made, strict=True)):
                if isinstance(found, Exception):
                    missing.append(f"{source}: {reason(found, source)}")
                elif found:
                    file.write(f'<script type="text/plain" id="pictures-{number}">{found}</script>\n')
                progress()
        file.write(after)
    return missing


def _page(data: Mapping[str, Any]) -> tuple[str, str]:
    """The page before and after its pictures."""
    template, style, script = (
        resources.files("stainnorm_transform.folders").joinpath(f"report.{kind}").read_text(encoding="utf-8")
        for kind in ("html", "css", "js")
    )
    before, after = template.split("$pictures\n")
    policy = _POLICY.format(_digest(style), _digest(script))
    # Names may hold anything: in JSON without "<" nothing ends the element that holds it.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    head = string.Template(before).substitute(policy=policy, style=style, data=text)
    return head, string.Template(after).substitute(script=script)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data(normalizer: FileNormalizer, entries: list[Entry], earlier: int) -> dict[str, Any]:
    """What the page shows, but for pictures."""
    usual = usual_offsets(entries)
    folders = {name: number for number, name in enumerate(dict.fromkeys(entry.folder for entry in entries))}
    return {
        "run": {
            "program": f"stainnorm {__version__}",
            "target": printable(normalizer.transform.target),
            "weights": normalizer.record.made_by.rpartition(" ")[2],
            "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
            "earlier": earlier,
            "given": normalizer.settings.offsets is not None,
            "profiles": normalizer.settings.slide_format.icc,
        },
        "flags": FLAGS,
        "folders": [{"name": name, "usual": usual.get(name)} for name in folders],
        "files": [
            {
                "name": entry.name,
                "folder": folders[entry.folder],
                "kind": "slide" if entry.is_slide else "image",
                "offset": entry.offset,
                "tiles": entry.tiles,
                "left_out": entry.left_out,
                "error": entry.standard_error,
                "flags": flags_of(entry, usual),
                "message": entry.message,
            }
            for entry in entries
        ],
    }


def _pair(normalizer: FileNormalizer, source: Path, output: Path) -> tuple[Image.Image, Image.Image]:
    """Before and after, small."""
    before = picture(source)
    if not normalizer.settings.slide_format.icc:
        return before, picture(output)
    color_map = torch.tensor(normalizer.record.color_map(output)).view(2, 4)
    after = shift_ab(pil_to_tensor(before), -color_map, normalizer.transform.preserve_white)
    return before, to_pil_image(after)


def _encoded(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, **_FORMAT)
    return base64.b64encode(content.getvalue()).decode()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Adds the name of the file to an error of a full disk, which has none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
