"""JPEG tiles of a TIFF. What libjpeg only warns of, lost or damaged data, is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from stainnorm_transform.slides.tables import Pixels

# What may follow 0xFF in the data of a scan, besides what is no marker there.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_START, _END = b"\xff\xd8", 0xD9
_FILL = 64  # bytes, by which some writers fill up
_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEGMENTS = frozenset({*range(0xC0, 0xD0), *range(0xDA, 0xF0), 0xFE})
_APP0, _APP14 = 0xE0, 0xEE
# Of Adobe, before the byte that says the color model: 0 for RGB, 1 for YCbCr.
_COLOR_MODEL = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"


class Frame(NamedTuple):
    """What JPEG data says of itself.

    Attributes:
        width: in pixels.
        height: in pixels.
        channels: how many.
        model: RGB or YCBCR, as a marker of JFIF or Adobe says, or None where there is none.
    """

    width: int
    height: int
    channels: int
    model: str | None


def frame_of(data: bytes) -> Frame:
    """What JPEG data says of itself.

    Raises:
        ValueError: it ends early, has other segments than JPEG has, or does not say its size.
    """
    size, model, is_jfif = None, None, False
    for marker, content in _segments(data):
        if marker in _SIZES and len(content) >= 6:
            size = size or (int.from_bytes(content[3:5], "big"), int.from_bytes(content[1:3], "big"), content[5])
        is_jfif = is_jfif or (marker == _APP0 and content.startswith(b"JFIF"))
        if marker == _APP14 and content.startswith(b"Adobe"):
            model = "RGB" if content[11:12] == b"\0" else "YCBCR"
    if size is None:
        raise ValueError("JPEG data does not say its size")
    # JFIF knows no other.
    return Frame(*size, "YCBCR" if is_jfif else model)


def decode_jpeg(data: bytes, tables: bytes | None, model: str) -> Pixels:
    """RGBA pixels (H, W, 4).

    Args:
        data: from the first to the last marker.
        tables: what the tiles of an image have in common.
        model: RGB or YCBCR, the color model of the data where it does not say one.

    Raises:
        ValueError: it is damaged.
    """
    import simplejpeg  # type: ignore[import-untyped]

    common = tables[len(_START) : -2] if tables else b""
    whole = _START + _COLOR_MODEL + bytes([model == "YCBCR"]) + common + data[len(_START) :]
    return np.asarray(simplejpeg.decode_jpeg(whole, "RGBA", fastdct=False, fastupsample=False, strict=True))


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, its first bytes) of each segment."""
    place = 2
    while match := _MARKER.search(data, place):
        marker = match.group()[1]
        if marker == _END:
            if len(data) - match.end() > _FILL:
                raise ValueError("JPEG data ends too early")
            return
        if marker not in _SEGMENTS:
            raise ValueError(f"JPEG data has a marker that is none, {marker:#x}")
        length = int.from_bytes(data[match.end() : match.end() + 2], "big")
        yield marker, data[match.end() + 2 : match.end() + min(length, 16)]
        place = match.end() + length
    raise ValueError("JPEG data has no end")
