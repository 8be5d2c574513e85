"""The command ``stainnorm normalize``."""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import sys
from pathlib import Path

from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from stainnorm_transform import __version__, images, record, weights
from stainnorm_transform.cli_options import add_device, add_inputs
from stainnorm_transform.color import shift_ab
from stainnorm_transform.device import choose_device
from stainnorm_transform.files import printable, remove_leftovers, replacing
from stainnorm_transform.transform import NormalizeStain

OVERVIEW = "overview.png"
OVERVIEW_PAIRS = 24
# Errors that every other image would meet as well.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``normalize`` to the commands."""
    parser = commands.add_parser(
        "normalize",
        help="give images the colors of the target",
        description="Gives H&E images (PNG, JPEG, TIFF; 8-bit RGB or RGBA) the colors of the target. Every image "
        "gets one a*, b* offset of its own, so tiles of one slide may differ a little (for one offset a slide: "
        "NormalizeStain.for_slide in Python). Lightness and white glass (L* > 97) stay, and images without tissue keep "
        "their colors. Resolution, ICC profile and transparency are kept. JPEG is written at quality 95 without "
        "chroma subsampling, TIFF without loss. Whole-slide files are not read, and files of other kinds in a folder "
        "are left out.",
        epilog="DIR/offsets.csv lists each image, by its full path, with the offset that was taken from it; of several "
        "lines for one output the last counts. The same command again does what is missing: an image is finished if "
        "the list has it and path, size and time of change of the image and of its result are as listed, as are the "
        "weights and the version of the program. Results of images that are gone stay. Files that cannot be normalized "
        "are named at the end, and the exit status is then 1.",
    )
    add_inputs(parser)
    parser.add_argument(
        "--out", required=True, type=_folder, metavar="DIR", help="folder to write to, in the same subfolders"
    )
    parser.add_argument(
        "--weights",
        default=weights.DEFAULT,
        metavar="NAME|PATH",
        help="the target: a name that 'stainnorm list' shows, or a .safetensors file (default: %(default)s)",
    )
    add_device(parser)
    parser.add_argument("--again", action="store_true", help="normalize finished images again, too")
    parser.add_argument(
        "--overview",
        action="store_true",
        help=f"also write DIR/overview.png: up to {OVERVIEW_PAIRS} images before and after, evenly chosen",
    )
    parser.set_defaults(run=run)


def _folder(text: str) -> Path:
    if not text:  # a variable of the shell that is not set
        raise argparse.ArgumentTypeError("expected a folder, got an empty name")
    return Path(text)


def run(options: argparse.Namespace) -> int:
    """Normalizes as the options say; returns the exit status."""
    out: Path = options.out
    outputs = images.plan(options.inputs, out, [record.NAME, OVERVIEW] if options.overview else [record.NAME])
    transform = NormalizeStain.pretrained(options.weights).to(choose_device(options.device))
    made = record.Record(out, _made_by(transform))
    for path, output in outputs.items():
        if os.path.lexists(output) and not made.has(output):
            raise ValueError(
                f"{path} would be written to {output}, which is there and was not made by this command: choose another "
                "output folder, or remove it"
            )
    out.mkdir(parents=True, exist_ok=True)
    for folder in {output.parent for output in outputs.values()}:
        remove_leftovers(folder)
    done: list[Path] = []
    finished_before = 0
    failed: list[str] = []
    with made:
        try:
            for path, output in tqdm(outputs.items(), unit="image", disable=None):
                try:
                    if not options.again and made.is_current(path, output):
                        finished_before += 1
                    else:
                        _normalize(transform, path, output, made)
                    done.append(path)
                except Exception as error:
                    if isinstance(error, OSError) and error.errno in FULL:
                        go_on = "" if options.again else "; the same command goes on from here"
                        raise OSError(f"{error}: stopped; what was finished is kept{go_on}") from error
                    failed.append(f"{path}: {_reason(error, path)}")
        finally:
            earlier = f", {finished_before} of them by an earlier run" if finished_before else ""
            count = f"{len(done)} of {len(outputs)}"
            print(f"{count} images normalized to {transform.target!r} in {printable(str(out))}{earlier}")
            if failed:
                print(f"{len(failed)} failed:", *map(printable, failed), sep="\n  ", file=sys.stderr)
        if options.overview and done:
            _write_overview([(path, outputs[path]) for path in done], made, out / OVERVIEW)
    return 1 if failed else 0


def _made_by(transform: NormalizeStain) -> str:
    digest = hashlib.sha256(str(transform.preserve_white).encode())
    for tensor in transform.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return f"stainnorm {__version__} {transform.target} {digest.hexdigest()[:12]}"


def _normalize(transform: NormalizeStain, path: Path, output: Path, made: record.Record) -> None:
    """Writes the normalized image, its transparency kept, and its line."""
    source = made.source(path)
    image = images.read(path)
    device = transform.network.device
    colors = pil_to_tensor(image.convert("RGB")).to(device)
    seen = colors if image.mode == "RGB" else pil_to_tensor(images.flatten(image)).to(device)
    offset = transform.estimate_offset(seen)
    if not offset.isfinite().all():
        raise ValueError(f"the weights give an offset that is not finite: {offset.tolist()}")
    after = to_pil_image(shift_ab(colors, -offset[1:], transform.preserve_white).cpu())
    if image.mode == "RGBA":
        after.putalpha(image.getchannel("A"))
    content = images.encode(after, output.suffix, like=image)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary:
        temporary.write_bytes(content)
        made.add(source, output, offset[1].item(), offset[2].item(), temporary)


def _reason(error: Exception, path: Path) -> str:
    if isinstance(error, OSError) and error.filename is not None and os.fspath(error.filename) == str(path):
        return str(error.strerror)
    return str(error) or type(error).__name__


def _write_overview(pairs: list[tuple[Path, Path]], made: record.Record, path: Path) -> None:
    chosen = {round(index * (len(pairs) - 1) / (OVERVIEW_PAIRS - 1)) for index in range(OVERVIEW_PAIRS)}
    shown: list[tuple[str, Image.Image, Image.Image]] = []
    for source, output in (pairs[index] for index in sorted(chosen)):
        a, b = made.offset(output)
        caption = f"{output.relative_to(path.parent)}  before, after; taken away: a* {a:+.1f}, b* {b:+.1f}"
        try:
            before, after = images.read(source), images.read(output)
        except (OSError, ValueError) as error:
            print(printable(f"not in the overview: {source}: {_reason(error, source)}"), file=sys.stderr)
            continue
        shown.append((caption, images.thumbnail(before), images.thumbnail(after)))
    if shown:
        content = images.encode(images.contact_sheet(shown), path.suffix)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
