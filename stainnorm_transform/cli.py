"""The command ``stainnorm``."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from stainnorm_transform import __version__, cli_train, images, weights
from stainnorm_transform.color import shift_ab
from stainnorm_transform.device import choose_device
from stainnorm_transform.files import replacing
from stainnorm_transform.transform import NormalizeStain

TABLE = "offsets.csv"
OVERVIEW = "overview.png"
OVERVIEW_PAIRS = 24


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0 done, 1 some files failed, 2 nothing could be done."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (ValueError, OSError) as error:
        print(f"stainnorm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stainnorm: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stainnorm", description="Stain normalization of H&E images with ColorNormNet."
    )
    parser.add_argument("--version", action="version", version=f"stainnorm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    normalize = commands.add_parser(
        "normalize",
        help="give images the colors of the target",
        description="Gives H&E images (PNG, JPEG, TIFF; 8-bit RGB or RGBA) the colors of the target. Every image "
        "gets one a*, b* offset of its own; lightness and white glass stay, and images without tissue come back "
        "unchanged. Resolution, ICC profile and transparency are kept.",
        epilog="DIR/offsets.csv lists the offset that was taken from each image of this run. Files that cannot be "
        "normalized are named at the end, and the exit status is then 1.",
    )
    normalize.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help="image, or folder of images, searched with its subfolders"
    )
    normalize.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder to write to, in the same subfolders"
    )
    normalize.add_argument(
        "--weights",
        default=weights.DEFAULT,
        metavar="NAME|PATH",
        help="the target: a name that 'stainnorm list' shows, or a .safetensors file (default: %(default)s)",
    )
    normalize.add_argument(
        "--device", help="where to compute: cpu, cuda, cuda:1 (default: cuda if there is one, else cpu)"
    )
    normalize.add_argument(
        "--overview",
        action="store_true",
        help=f"also write DIR/overview.png: up to {OVERVIEW_PAIRS} images before and after, evenly chosen",
    )
    normalize.set_defaults(run=_normalize)

    cli_train.add_parser(commands)

    listing = commands.add_parser("list", help="show the shipped weights", description="Shows the shipped weights.")
    listing.set_defaults(run=_list)
    return parser


def _normalize(options: argparse.Namespace) -> int:
    outputs = images.plan(options.inputs, options.out, [TABLE, OVERVIEW] if options.overview else [TABLE])
    transform = NormalizeStain.pretrained(options.weights).to(choose_device(options.device))
    options.out.mkdir(parents=True, exist_ok=True)
    shown = {round(index * (len(outputs) - 1) / (OVERVIEW_PAIRS - 1)) for index in range(OVERVIEW_PAIRS)}
    table: list[tuple[str, str, str, str]] = []
    pairs: list[tuple[str, Image.Image, Image.Image]] = []
    failed: list[str] = []
    try:
        for index, (path, output) in enumerate(tqdm(outputs.items(), unit="image", disable=None)):
            try:
                before = images.read(path)
                after, a, b = _normalize_one(transform, before)
                images.write(after, output, like=before)
            except Exception as error:
                failed.append(f"{path}: {error or type(error).__name__}")
                continue
            table.append((str(path), str(output), f"{a:.3f}", f"{b:.3f}"))
            if options.overview and index in shown:
                caption = f"{output.relative_to(options.out)}  offset a* {a:+.1f}, b* {b:+.1f}"
                pairs.append((caption, images.thumbnail(before), images.thumbnail(after)))
    finally:
        print(f"{len(table)} of {len(outputs)} images normalized to {transform.target!r} in {options.out}")
        if failed:
            print(f"{len(failed)} failed:", *failed, sep="\n  ", file=sys.stderr)
        with (
            replacing(options.out / TABLE) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            csv.writer(file).writerows([("input", "output", "offset_a", "offset_b"), *table])
        if pairs:
            images.write(images.contact_sheet(pairs), options.out / OVERVIEW)
    return 1 if failed else 0


def _normalize_one(transform: NormalizeStain, image: Image.Image) -> tuple[Image.Image, float, float]:
    """The normalized image, its transparency kept, and the (a*, b*) that was taken away."""
    device = transform.network.device
    colors = pil_to_tensor(image.convert("RGB")).to(device)
    seen = colors if image.mode == "RGB" else pil_to_tensor(images.flatten(image)).to(device)
    offset = transform.estimate_offset(seen)
    after = to_pil_image(shift_ab(colors, -offset[1:], transform.preserve_white).cpu())
    if image.mode == "RGBA":
        after.putalpha(image.getchannel("A"))
    return after, offset[1].item(), offset[2].item()


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
