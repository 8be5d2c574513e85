"""The pyramid of a normalized slide: encoded tiles of every level, made piece by piece."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from stainnorm_transform.resources import in_order
from stainnorm_transform.slides.reader import Slide, corners
from stainnorm_transform.slides.tables import Pixels

# Side of a tile in every level; two by two are read, shifted and encoded at once.
TILE = 512
BLOCK = 2 * TILE
# JPEG from this quality on is 4:2:2, below 4:2:0.
_HIGH_QUALITY = 90

Encode = Callable[[Pixels], bytes]
Recolor = Callable[[Pixels], Pixels]


class Pyramid:
    """Levels of half the size each, down to a single tile. Memory does not grow with the slide, but for a row of tiles.

    First all tiles of ``largest`` must be taken, then ``smaller`` has the other levels.

    Args:
        slide: an open slide.
        recolor: what gives pixels (H, W, 4) their new colors; None leaves them as they are.
        encode: what makes a tile of pixels (TILE, TILE, 4).
        folder: for temporary files, in which smaller levels wait.
    """

    def __init__(self, slide: Slide, recolor: Recolor | None, encode: Encode, folder: Path) -> None:
        self.slide = slide
        self.recolor = recolor
        self.encode = encode
        self.sizes = level_sizes(*slide.dimensions)
        self.smaller = [_Level(below, folder) for below in self.sizes[:-1]]
        self.top: Pixels = np.empty((0, 0, 4), np.uint8)

    def largest(self, threads: int, progress: Callable[[int], object]) -> Generator[bytes]:
        """The tiles of level 0, row by row; ``progress`` is told how many pixels of it have been done."""
        width, height = self.slide.dimensions
        second_row: list[bytes] = []
        # Nobody may read from the slide any more when the writer gives up.
        with contextlib.closing(in_order(self._block, corners(width, height, BLOCK), threads)) as blocks:
            for (x, y), (rows, lower) in zip(corners(width, height, BLOCK), blocks, strict=True):
                # Before the tiles are passed on, as nobody asks for one after the last.
                if lower is not None:
                    self._add(1, y // BLOCK, x // BLOCK, *lower)
                progress(min(BLOCK, width - x) * min(BLOCK, height - y))
                if x == 0:
                    yield from second_row
                    second_row = []
                yield from rows[0]
                second_row += [tile for row in rows[1:] for tile in row]
        yield from second_row

    def close(self) -> None:
        """Removes the temporary files."""
        for level in self.smaller:
            level.file.close()

    def _block(self, corner: tuple[int, int]) -> tuple[list[list[bytes]], tuple[Pixels, bytes] | None]:
        """The tiles of a block, in rows, and the tile of level 1 that it becomes, also encoded."""
        x, y = corner
        width, height = self.slide.dimensions
        size = min(BLOCK, width - x), min(BLOCK, height - y)
        pixels = self.slide.pixels(x, y, *size)
        if self.recolor is not None:
            pixels = self.recolor(pixels)
        pixels = _padded(pixels, BLOCK)
        tiles = [
            [self.encode(pixels[top : top + TILE, left : left + TILE]) for left in range(0, size[0], TILE)]
            for top in range(0, size[1], TILE)
        ]
        if not self.smaller:
            self.top = pixels[:TILE, :TILE]
            return tiles, None
        half = self._whole(1, y // BLOCK, x // BLOCK, _half(pixels))
        return tiles, (half, self.encode(half))

    def _add(self, level: int, row: int, column: int, tile: Pixels, encoded: bytes) -> None:
        """Puts away a tile of a smaller level, and those of the next that it completes."""
        self.smaller[level - 1].add(encoded)
        if level == len(self.smaller):
            self.top = tile
            return
        parts = self.smaller[level].place(row, column, _half(tile))
        if parts is not None:
            whole = self._whole(level + 1, row // 2, column // 2, parts)
            self._add(level + 1, row // 2, column // 2, whole, self.encode(whole))

    def _whole(self, level: int, row: int, column: int, tile: Pixels) -> Pixels:
        """A tile whose edge is repeated where the level ends in it."""
        width, height = self.sizes[level]
        return _padded(tile[: height - row * TILE, : width - column * TILE], TILE)

    def thumbnail(self) -> Image.Image:
        """The smallest level."""
        width, height = self.sizes[-1]
        return Image.fromarray(np.ascontiguousarray(self.top[:height, :width, :3]))


class _Level:
    """The tiles of a smaller level, on disk until their turn comes, and those of which parts are missing."""

    def __init__(self, below: tuple[int, int], folder: Path) -> None:
        self.rows, self.columns = (-(-length // TILE) for length in reversed(below))
        self.file: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.lengths: list[int] = []
        # Of a row of tiles, and with it of the width of the slide: without the fourth channel.
        self.parts: dict[int, list[tuple[int, int, Pixels]]] = {}

    def add(self, tile: bytes) -> None:
        self.file.write(tile)
        self.lengths.append(len(tile))

    def place(self, row: int, column: int, part: Pixels) -> Pixels | None:
        """Puts a tile of the level below, at half its size, in its place; returns the tile that this completes."""
        parts = self.parts.setdefault(column // 2, [])
        parts.append((row % 2 * TILE // 2, column % 2 * TILE // 2, part[..., :3].copy()))
        last = (row % 2 or row == self.rows - 1) and (column % 2 or column == self.columns - 1)
        if not last:
            return None
        whole = np.full((TILE, TILE, 4), 255, np.uint8)
        for top, left, pixels in self.parts.pop(column // 2):
            whole[top : top + TILE // 2, left : left + TILE // 2, :3] = pixels
        return whole

    def tiles(self) -> Iterator[bytes]:
        self.file.seek(0)
        for length in self.lengths:
            yield self.file.read(length)


def level_sizes(width: int, height: int) -> list[tuple[int, int]]:
    """(width, height) of each level: halves, rounded up, down to a single tile."""
    count = 1 + max(0, math.ceil(math.log2(max(width, height) / TILE)))
    return [(-(-width // 2**level), -(-height // 2**level)) for level in range(count)]


def subsampling(quality: int) -> tuple[int, int]:
    """How many pixels share a color in JPEG of a quality, across and down: 4:2:2 or 4:2:0.

    Bio-Formats, and so QuPath and Fiji, converts 4:4:4 twice.
    """
    return (2, 1) if quality >= _HIGH_QUALITY else (2, 2)


def encoder(quality: int | None) -> Encode:
    """Makes JPEG tiles of a quality, or, for None, tiles without loss: Deflate of differences."""
    import imagecodecs

    def encode(pixels: Pixels) -> bytes:
        if quality is None:
            differences = imagecodecs.delta_encode(pixels[..., :3], axis=-2)
            return bytes(imagecodecs.deflate_encode(differences.tobytes(), level=6))
        # Of RGBA the codec leaves out A.
        options: dict[str, Any] = {"colorspace": "rgba", "outcolorspace": "ycbcr", "subsampling": subsampling(quality)}
        return bytes(imagecodecs.jpeg8_encode(np.ascontiguousarray(pixels), level=quality, **options))

    return encode


def _half(pixels: Pixels) -> Pixels:
    """Every pixel the mean of four."""
    image = Image.frombuffer("RGBX", pixels.shape[1::-1], np.ascontiguousarray(pixels), "raw", "RGBX", 0, 1)
    return np.asarray(image.reduce(2))


def _padded(pixels: Pixels, side: int) -> Pixels:
    """Repeats the last row and column up to a square, so that no other color bleeds into the edge."""
    height, width = pixels.shape[:2]
    if (height, width) == (side, side):
        return pixels
    return np.pad(pixels, ((0, side - height), (0, side - width), (0, 0)), mode="edge")
