"""Regions of regular TIFFs: levels of tiles or strips, nothing between or over which they lie."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
from PIL import Image

from stainnorm_transform.slides.metadata import of_tiff
from stainnorm_transform.slides.tables import Pixels
from stainnorm_transform.slides.tiff_copies import is_copy
from stainnorm_transform.slides.tiff_scan import channel_order, name_of, other_images, the_scan, unmarked
from stainnorm_transform.slides.tiff_tiles import TILE_PIXELS, Level

_ORIENTATION = 274
Box = tuple[int, int, int, int]


class TiffReader:
    """The levels of a TIFF of 8-bit RGB, and what it says of itself. Reading is safe in threads.

    Args:
        file: an open ``tifffile.TiffFile``; it is closed with the reader.
        skip_damaged: whether tiles that cannot be decoded are left transparent and listed, instead of an error.

    Attributes:
        level_dimensions: (width, height) of each level in pixels, the largest first.
        level_downsamples: how many pixels of level 0 one of each level stands for, a side.
        metadata: what the file says of itself.
        properties: none, as these are OpenSlide's.
        is_plain: whether it is of no scanner's format, and holds nothing but the scan.

    Raises:
        ValueError: it is not 8-bit RGB, not supported, or more than one image.
    """

    def __init__(self, file: Any, skip_damaged: bool = False) -> None:
        self._file = file
        self._skip_damaged = skip_damaged
        self._skipped: set[tuple[int, int]] = set()
        lock = threading.Lock()
        scan = the_scan(file)
        self._scan = scan.index
        order = channel_order(file.ome_metadata, len(scan.pages)) if len(scan.pages) > 1 else [0]
        self._levels = [Level(file, [level.pages[i].aspage() for i in order], lock) for level in scan.levels]
        for pages in unmarked(file, scan):
            if not is_copy(Level(file, pages, lock), self._levels):
                raise other_images(file)
        page = scan.keyframe.aspage()
        self._turn = _Turn(page.tags.valueof(_ORIENTATION, 1))
        self.level_dimensions = [self._turn.size(level.width, level.height) for level in self._levels]
        width, height = self.level_dimensions[0]
        self.level_downsamples = [(width / w + height / h) / 2 for w, h in self.level_dimensions]
        self.is_plain = len(file.series) == 1 and not page.is_svs
        self.properties: dict[str, str] = {}
        self.metadata = of_tiff(file, page, self._turn.is_transposed)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    @property
    def damaged(self) -> list[Box]:
        """(x, y, width, height) of the tiles of level 0 that were skipped, in its pixels."""
        size = self.level_dimensions[0]
        return sorted(self._turn.shown(self._levels[0].place(*tile), size) for tile in self._skipped.copy())

    def region(self, x: int, y: int, width: int, height: int, level: int) -> Pixels:
        """RGBA (height, width, 4) at (x, y), in pixels of level 0; what was not scanned is transparent."""
        scale, size = self.level_downsamples[level], self.level_dimensions[level]
        left, top, columns, rows = self._turn.stored((round(x / scale), round(y / scale), width, height), size)
        out = self._levels[level].region(left, top, columns, rows, functools.partial(self._tile, level))
        return self._turn.show(out)

    def associated_images(self) -> dict[str, Image.Image]:
        """Label, whole glass (macro) and thumbnail, by name, where the file names its images so."""
        found = {}
        for series in self._file.series:
            page = series.keyframe
            name = name_of(series)
            if name and series.index != self._scan and page.imagewidth * page.imagelength <= TILE_PIXELS:
                found[name] = Image.fromarray(np.squeeze(series.asarray()))
        return found

    def _tile(self, level: int, column: int, row: int) -> Pixels | None:
        try:
            return self._levels[level].tile(column, row)
        except Exception as error:
            # A disk or network that fails, or memory, is no damage of the slide.
            if not self._skip_damaged or isinstance(error, (OSError, MemoryError)):
                raise
            if level == 0:
                self._skipped.add((column, row))
            return None


class _Turn:
    """TIFF's Orientation: the stored image, transposed, then mirrored from left to right and from top to bottom."""

    def __init__(self, orientation: int) -> None:
        self.is_transposed = orientation in (5, 6, 7, 8)
        self._mirrored = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The shown size of a stored image."""
        return (height, width) if self.is_transposed else (width, height)

    def stored(self, box: Box, size: tuple[int, int]) -> Box:
        """Where (x, y, width, height) of a shown image of this size is stored."""
        return self._transposed(self._turned(box, size))

    def shown(self, box: Box, size: tuple[int, int]) -> Box:
        """Where a stored (x, y, width, height) is shown."""
        return self._turned(self._transposed(box), size)

    def show(self, pixels: Pixels) -> Pixels:
        """Stored pixels as they are shown."""
        if self.is_transposed:
            pixels = pixels.swapaxes(0, 1)
        across, down = (-1 if mirrored else 1 for mirrored in self._mirrored)
        return np.ascontiguousarray(pixels[::down, ::across])

    def _transposed(self, box: Box) -> Box:
        x, y, width, height = box
        return (y, x, height, width) if self.is_transposed else box

    def _turned(self, box: Box, size: tuple[int, int]) -> Box:
        x, y, width, height = box
        across, down = self._mirrored
        return size[0] - x - width if across else x, size[1] - y - height if down else y, width, height
