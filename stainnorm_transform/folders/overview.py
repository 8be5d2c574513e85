"""The contact sheet of a run: files before and after."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from stainnorm_transform.files import printable, replacing
from stainnorm_transform.folders import images
from stainnorm_transform.folders.outcome import reason
from stainnorm_transform.folders.record import Record
from stainnorm_transform.slides import Slide, is_slide

THUMBNAIL_SIDE = 256
# So many files are shown, evenly chosen.
PAIRS = 24


def picture(path: Path) -> Image.Image:
    """An image, or a slide, small."""
    if not is_slide(path):
        return thumbnail(images.read(path))
    with Slide(path, skip_damaged=True) as slide:
        return thumbnail(slide.thumbnail(THUMBNAIL_SIDE))


def thumbnail(image: Image.Image) -> Image.Image:
    """A copy on white glass of at most ``THUMBNAIL_SIDE`` pixels a side."""
    small = images.flatten(image).copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return small


def contact_sheet(pairs: Sequence[tuple[str, Image.Image, Image.Image]], columns: int = 3) -> Image.Image:
    """Pairs of thumbnails under their captions: before on the left, after on the right."""
    font = ImageFont.load_default(12)
    margin, line = 8, 18
    width, height = 2 * THUMBNAIL_SIDE + margin, THUMBNAIL_SIDE + line
    columns = min(columns, len(pairs))
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * (width + 2 * margin), rows * (height + margin)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (caption, before, after) in enumerate(pairs):
        caption = " ".join(caption.encode(errors="replace").decode().split())
        x, y = index % columns * (width + 2 * margin) + margin, index // columns * (height + margin)
        while draw.textlength(caption, font) > width:
            caption = "..." + caption[4:]
        draw.text((x, y), caption, "black", font)
        sheet.paste(before, (x, y + line))
        sheet.paste(after, (x + THUMBNAIL_SIDE + margin, y + line))
    return sheet


def write(outputs: Mapping[Path, Path], made: Record, path: Path) -> None:
    """Writes the contact sheet of some files and their outputs, with the offsets of the record."""
    pairs = list(outputs.items())
    chosen = {round(index * (len(pairs) - 1) / (PAIRS - 1)) for index in range(PAIRS)}
    shown: list[tuple[str, Image.Image, Image.Image]] = []
    for source, output in (pairs[index] for index in sorted(chosen)):
        a, b = made.offset(output)
        caption = f"{output.relative_to(path.parent)}  before, after; taken away: a* {a:+.1f}, b* {b:+.1f}"
        try:
            shown.append((caption, picture(source), picture(output)))
        except (OSError, ValueError) as error:
            print(printable(f"not in the overview: {source}: {reason(error, source)}"), file=sys.stderr)
    if shown:
        content = images.encode(contact_sheet(shown), path.suffix)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
