"""Regions of slides in the formats of scanners, by OpenSlide, or, where it is the same, by tifffile."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stainnorm_transform.slides.metadata import of_openslide
from stainnorm_transform.slides.tables import Pixels
from stainnorm_transform.slides.tiff_tiles import Level

# Bytes of decoded tiles that OpenSlide keeps: enough for those that neighboring blocks share.
_CACHE = 8 << 20
# A region that is damaged is read in parts, and only the damaged ones are skipped. They are the tiles of the slide, or,
# where it does not tell their size, of this side.
_PART = 256
# None, LZW, JPEG, Deflate (twice), JPEG 2000 in RGB: of these OpenSlide and imagecodecs make the same pixels.
_SAME_DECODERS = frozenset({1, 5, 7, 8, 32946, 33005})


class OpenSlideReader:
    """A slide that OpenSlide reads. Reading is safe in threads.

    Args:
        path: of the slide.
        icc_profile: of its colors, if it is known better.
        skip_damaged: whether damaged parts are left transparent and listed, instead of an error.
        tiff: the open ``tifffile.TiffFile`` of a slide whose tiles lie side by side. They are decoded directly, where
            OpenSlide would give the same pixels in four times the time. It is closed with the reader.

    Attributes:
        level_dimensions: (width, height) of each level in pixels, the largest first.
        level_downsamples: how many pixels of level 0 one of each level stands for, a side.
        metadata: what the file says of itself.
        properties: the same in OpenSlide's words, and all that scanner and lab wrote.
        is_plain: as of ``TiffReader``.
    """

    is_plain = False

    def __init__(
        self, path: Path, icc_profile: bytes | None = None, skip_damaged: bool = False, tiff: Any = None
    ) -> None:
        self._path = path
        self._skip_damaged = skip_damaged
        self._skipped: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        self._by_thread: dict[int, Any] = {}
        self._slide = _open(path)
        self.level_dimensions: list[tuple[int, int]] = [tuple(size) for size in self._slide.level_dimensions]
        self.level_downsamples = [float(value) for value in self._slide.level_downsamples]
        self.metadata = of_openslide(self._slide, icc_profile)
        self.properties: dict[str, str] = dict(self._slide.properties)
        self._parts = [self._part(level) for level in range(len(self.level_dimensions))]
        self._tiff = tiff
        self._levels = [] if tiff is None else _regular_levels(tiff, self.level_dimensions)

    def close(self) -> None:
        """Closes the files."""
        self._levels = []
        if self._tiff is not None:
            self._tiff.close()
        self._slide.close()
        for slide in self._by_thread.values():
            slide.close()

    @property
    def damaged(self) -> list[tuple[int, int, int, int]]:
        """(x, y, width, height) of the parts of level 0 that were skipped, in its pixels."""
        width, height = self.level_dimensions[0]
        wide, high = self._parts[0]
        return sorted((x, y, min(wide, width - x), min(high, height - y)) for x, y in self._skipped.copy())

    def region(self, x: int, y: int, width: int, height: int, level: int) -> Pixels:
        """RGBA (height, width, 4) at (x, y), in pixels of level 0; what was not scanned is transparent."""
        if (pixels := self._directly(x, y, width, height, level)) is not None:
            return pixels
        if not self._skip_damaged:
            return np.asarray(self._slide.read_region((x, y), level, (width, height)))
        if (pixels := self._read(x, y, width, height, level)) is not None:
            return pixels
        scale, (wide, high) = self.level_downsamples[level], self._parts[level]
        left, top = round(x / scale), round(y / scale)
        out = np.zeros((height, width, 4), np.uint8)
        for part_y in range(top // high * high, top + height, high):
            for part_x in range(left // wide * wide, left + width, wide):
                x0, x1 = max(part_x, left) - left, min(part_x + wide, left + width) - left
                y0, y1 = max(part_y, top) - top, min(part_y + high, top + height) - top
                start = x + round(x0 * scale), y + round(y0 * scale)
                pixels = self._read(*start, x1 - x0, y1 - y0, level)
                if pixels is not None:
                    out[y0:y1, x0:x1] = pixels
                elif level == 0:
                    self._skipped.add((part_x, part_y))
        return out

    def associated_images(self) -> dict[str, Image.Image]:
        """Label, whole glass (macro) and thumbnail, by name."""
        return dict(self._slide.associated_images)

    def _directly(self, x: int, y: int, width: int, height: int, level: int) -> Pixels | None:
        """A region by its tiles, or None where it takes OpenSlide, as what is damaged does."""
        left, top = x / self.level_downsamples[level], y / self.level_downsamples[level]
        # Between pixels, OpenSlide interpolates.
        if not self._levels or not (left.is_integer() and top.is_integer()):
            return None
        try:
            return self._levels[level].region(int(left), int(top), width, height)
        except MemoryError:
            raise
        except Exception:
            return None

    def _part(self, level: int) -> tuple[int, int]:
        """Width and height of the tiles of a level."""
        sides = [self._slide.properties.get(f"openslide.level[{level}].tile-{side}") for side in ("width", "height")]
        width, height = (int(side) if side else _PART for side in sides)
        return width, height

    def _read(self, x: int, y: int, width: int, height: int, level: int) -> Pixels | None:
        """A region, or None where it is damaged. By a slide of this thread, as after an error it reads no more."""
        import openslide

        thread = threading.get_ident()
        with self._lock:
            slide = self._by_thread.get(thread)
        if slide is None:
            slide = _open(self._path)
            with self._lock:
                self._by_thread[thread] = slide
        try:
            return np.asarray(slide.read_region((x, y), level, (width, height)))
        except openslide.OpenSlideError:
            with self._lock:
                del self._by_thread[thread]
            slide.close()
            return None


def _regular_levels(file: Any, sizes: Sequence[tuple[int, int]]) -> list[Level]:
    """The tiles of each level, by the sizes of OpenSlide's; none if they are not all there, in RGB and side by side."""
    tiled = [page.aspage() for page in file.pages if page.is_tiled]
    lock = threading.Lock()
    levels = []
    for size in sizes:
        pages = [page for page in tiled if (page.imagewidth, page.imagelength) == size]
        if len(pages) != 1 or pages[0].samplesperpixel != 3 or pages[0].compression not in _SAME_DECODERS:
            return []
        # OpenSlide shows a smaller level where a tile is missing.
        if not all(pages[0].databytecounts) or not all(pages[0].dataoffsets):
            return []
        try:
            level = Level(file, pages, lock)
            if not level.is_sure_of_colors():
                return []
        except ValueError:
            return []
        levels.append(level)
    return levels


def _open(path: Path) -> Any:
    import openslide

    slide = openslide.OpenSlide(path)
    slide.set_cache(openslide.OpenSlideCache(_CACHE))
    return slide
