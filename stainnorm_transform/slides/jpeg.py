"""JPEG tiles of a TIFF. What libjpeg only warns of, lost or damaged data, is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator

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


def check_jpeg(data: bytes) -> None:
    """Raises ValueError for data that ends early, or has other segments than JPEG has."""
    for _ in _segments(data):
        pass


def color_model(data: bytes) -> str | None:
    """RGB or YCBCR, as a marker of JFIF or Adobe in the data says, or None where there is none."""
    segments = list(_segments(data))
    if any(marker == _APP0 and content.startswith(b"JFIF") for marker, content in segments):
        return "YCBCR"
    adobe = [content for marker, content in segments if marker == _APP14 and content.startswith(b"Adobe")]
    return None if not adobe else "RGB" if adobe[-1][11:12] == b"\0" else "YCBCR"


def frame_of(data: bytes) -> tuple[int, int, int]:
    """(width, height, channels) that data says it has.

    Raises:
        ValueError: it is damaged, or does not say it.
    """
    for marker, content in _segments(data):
        if marker in _SIZES and len(content) >= 6:
            return int.from_bytes(content[3:5], "big"), int.from_bytes(content[1:3], "big"), content[5]
    raise ValueError("JPEG data does not say its size")


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
