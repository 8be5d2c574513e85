"""Which image of a TIFF is the scan, and whether it can be read as RGB."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import numpy as np

from stainnorm_transform.slides.tiff_tiles import CONVERT

# Attributes of channels in OME-XML.
_FLUORESCENCE = {"Fluor", "EmissionWavelength", "ExcitationWavelength"}
_CHANNELS = {"red": 0, "r": 0, "green": 1, "g": 1, "blue": 2, "b": 2, "alpha": 3, "a": 3}
# Red, green and blue as signed RGBA.
_COLORS = {"-16776961": 0, "16711935": 1, "65535": 2}
_NUMBERED = re.compile(r"(channel|ch|c)?[\s:_#-]*[\d:]*$", re.IGNORECASE)
# Images beside the scan.
ASSOCIATED = ("thumbnail", "label", "macro")


def the_scan(file: Any) -> Any:
    """The series of an open ``tifffile.TiffFile`` whose levels are those of the scan.

    tifffile finds levels in SubIFDs, and in pages by their sizes. Red, green and blue may be side by side, planes of a
    page, or, in OME-TIFF, pages of 8 bits each.

    Raises:
        ValueError: it is not 8-bit RGB, or the file has other images, which would be lost.
    """
    scan = max(file.series, key=lambda series: _pixels(series.keyframe))
    page = scan.keyframe
    is_split = "C" in scan.axes
    check_rgb(page, _product(scan, set("SC")), is_split)
    count = _product(scan, set(scan.axes) - set("YXSC"))
    if count > 1:
        what = f"expected one image, got {count} of one size (axes {scan.axes})"
        raise ValueError(f"{what}, of which only one would be kept: split it first")
    if is_split:
        if not file.is_ome:
            raise ValueError(f"expected RGB, got three grey images; {CONVERT}")
        if any(each is None for level in scan.levels for each in level.pages):
            raise ValueError("a channel is missing")
    if scan.is_multifile:
        raise ValueError(f"not supported: OME-TIFF of several files; {CONVERT}")
    # Thumbnail, label and image of the whole glass are small, or in strips beside tiles.
    others = [each.keyframe for each in file.series if each is not scan]
    largest = max((_pixels(each) for each in others if each.is_tiled or not page.is_tiled), default=0)
    if largest > _pixels(page) / 4 or (file.is_ome and scan is not file.series[0]):
        raise other_images(file)
    return scan


def other_images(file: Any) -> ValueError:
    """What is said of a file whose other images would be lost."""
    first = ", and first" if file.is_ome else ""
    return ValueError(f"expected one scan{first}, got other images beside it, which would be lost: split it first")


def name_of(series: Any) -> str | None:
    """Which image beside a scan one is, where it is named so."""
    return next((word for word in ASSOCIATED if word in series.name.lower()), None)


def unmarked(file: Any, scan: Any) -> list[list[Any]]:
    """Pages of each image that nothing but its size makes a smaller copy of the scan, which has tiles.

    Raises:
        ValueError: one can be none.
    """
    images = list(scan.levels[1:])
    if scan.keyframe.is_tiled:
        images += [each for each in file.series if each is not scan and each.keyframe.is_tiled and not name_of(each)]
    images = [each for each in images if not (each.keyframe.is_reduced or each.keyframe.is_subifd)]
    if any(len(each.pages) != len(scan.pages) or None in each.pages for each in images):
        raise other_images(file)
    return [[page.aspage() for page in each.pages] for each in images]


def channel_order(xml: str, count: int) -> list[int]:
    """Which of the channels of an OME-TIFF are red, green, blue and, if there are four, the transparency.

    Names say it, or else colors. Numbers are no names, and channels of which nothing is said are in this order.

    Raises:
        ValueError: they are named otherwise, or are of fluorescence.
    """
    order = list(range(count))
    try:
        channels = list(ElementTree.fromstring(xml).iterfind("{*}Image[1]/{*}Pixels/{*}Channel"))
    except ElementTree.ParseError:
        return order
    if any(not _FLUORESCENCE.isdisjoint(channel.attrib) for channel in channels):
        raise ValueError("expected RGB, got three channels of fluorescence")
    names = [name for name in (channel.get("Name", "").strip() for channel in channels) if not _NUMBERED.match(name)]
    if names:
        found = [_CHANNELS.get(name.lower()) for name in names]
        if sorted(found, key=str) != order:
            raise ValueError(f"expected the channels red, green and blue, got {', '.join(names)}")
    else:
        found = [_COLORS.get(channel.get("Color", "")) for channel in channels]
    return [found.index(number) for number in order] if sorted(found, key=str) == order else order


def check_rgb(page: Any, channels: int, is_split: bool = False) -> None:
    """Raises ValueError for an image that is not 8-bit RGB.

    Args:
        page: of the image, by tifffile.
        channels: of the image.
        is_split: whether the page is that of one channel.
    """
    bits = page.bitspersample
    if page.photometric.name == "PALETTE":
        raise ValueError("expected 8-bit RGB, got a palette: convert it to RGB")
    if channels not in (3, 4) or bits != 8 or page.dtype != np.uint8:
        kind = f" ({page.dtype})" if bits == 8 and page.dtype not in (None, np.uint8) else ""
        raise ValueError(f"expected 8-bit RGB, got {bits} bits{kind} and {channels} channel{'s' * (channels > 1)}")
    if page.photometric.name not in (("MINISBLACK",) if is_split else ("RGB", "YCBCR")):
        raise ValueError(f"expected RGB, got color model {page.photometric.name}")


def _pixels(page: Any) -> int:
    return int(page.imagewidth * page.imagelength)


def _product(series: Any, axes: set[str]) -> int:
    return math.prod(size for axis, size in zip(series.axes, series.shape, strict=True) if axis in axes)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Silences tifffile, whose messages of damage do not name the file."""
    import tifffile

    logger: logging.Logger = tifffile.logger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
