"""Image files: finding, reading and writing them, and the contact sheet."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from stainnorm_transform.files import replacing

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
THUMBNAIL_SIDE = 256


def plan(inputs: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Which file each image is written to: ``out`` plus its path below the input folder it was found in.

    Folders are searched recursively, except for ``out`` itself.

    Raises:
        ValueError: no image, two images for one output, or an output that is an input.
    """
    outputs: dict[Path, Path] = {}
    for given in inputs:
        if not given.exists():
            raise ValueError(f"{given} does not exist")
        for path in _walk(given, out.resolve()) if given.is_dir() else [given]:
            outputs.setdefault(path, out / (path.relative_to(given) if given.is_dir() else path.name))
    if not outputs:
        raise ValueError(f"no images ({', '.join(SUFFIXES)}) in {', '.join(str(given) for given in inputs)}")
    sources: dict[Path, Path] = {}
    originals = {path.resolve() for path in outputs}
    for path, output in outputs.items():
        if output.resolve() in originals:
            raise ValueError(f"{output} is an input and would be overwritten: choose another output folder")
        if output in sources:
            raise ValueError(
                f"{sources[output]} and {path} would both be written to {output}: normalize them into different folders"
            )
        sources[output] = path
    return outputs


def _walk(folder: Path, skip: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if (Path(where) / name).resolve() != skip)
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(where) / name


def read(path: Path) -> Image.Image:
    """Reads an image file of mode RGB or RGBA; palettes are resolved.

    Raises:
        ValueError: it is grey, has more than 8 bits a channel, more than one page or another color model.
        OSError: it is no image, or not a whole one.
    """
    with Image.open(path) as image:
        if ";16" in str(image.tile):  # Pillow would drop the lower 8 bits in silence.
            raise ValueError("16 bits a channel: convert it to 8 bits first")
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"{image.n_frames} pages, of which only the first would be kept: split it first")  # type: ignore[attr-defined]
        image.load()
        if image.mode in ("1", "L", "LA", "I", "I;16", "F"):
            raise ValueError(f"a grey image (mode {image.mode}) has no stain color")
        if image.mode == "P":
            return _with_info(image.convert("RGBA" if "transparency" in image.info else "RGB"), image)
        if image.mode not in ("RGB", "RGBA"):
            raise ValueError(f"color model {image.mode}: convert it to RGB first")
        return image


def flatten(image: Image.Image) -> Image.Image:
    """RGB as seen on white glass: what is transparent becomes white."""
    if image.mode == "RGB":
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def write(image: Image.Image, path: Path, like: Image.Image) -> None:
    """Writes an image, whole or not at all, with the resolution, ICC profile and EXIF data of ``like``.

    JPEG is written at quality 95 without chroma subsampling, TIFF with lossless compression.
    """
    suffix = path.suffix.lower()
    options: dict[str, Any] = {key: like.info[key] for key in ("dpi", "icc_profile") if key in like.info}
    if suffix in (".jpg", ".jpeg"):
        options |= {"quality": 95, "subsampling": 0}
    if suffix in (".tif", ".tiff"):
        options["compression"] = "tiff_adobe_deflate"
    elif like.getexif():
        options["exif"] = like.getexif()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, **options)


def thumbnail(image: Image.Image) -> Image.Image:
    """A copy on white glass of at most ``THUMBNAIL_SIDE`` pixels a side."""
    small = flatten(image).copy()
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
        x, y = index % columns * (width + 2 * margin) + margin, index // columns * (height + margin)
        while draw.textlength(caption, font) > width:
            caption = "..." + caption[4:]
        draw.text((x, y), caption, "black", font)
        sheet.paste(before, (x, y + line))
        sheet.paste(after, (x + THUMBNAIL_SIDE + margin, y + line))
    return sheet


def _with_info(image: Image.Image, like: Image.Image) -> Image.Image:
    image.info = {key: value for key, value in like.info.items() if key != "transparency"}
    return image
