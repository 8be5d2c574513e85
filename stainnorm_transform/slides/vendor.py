"""Regions of slides in the formats of scanners, by OpenSlide."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stainnorm_transform.slides.metadata import of_openslide
from stainnorm_transform.slides.tables import Pixels

# Bytes of decoded tiles that OpenSlide keeps: enough for those that neighboring blocks share.
_CACHE = 8 << 20
# A region that is damaged is read in parts, and only the damaged ones are skipped. They are the tiles of the slide, or,
# where it does not tell their size, of this side.
_PART = 256


class OpenSlideReader:
    """A slide that OpenSlide reads. Reading is safe in threads.

    Args:
        path: of the slide.
        icc_profile: of its colors, if it is known better.
        skip_damaged: whether damaged parts are left transparent and listed, instead of an error.

    Attributes:
        level_dimensions: (width, height) of each level in pixels, the largest first.
        level_downsamples: how many pixels of level 0 one of each level stands for, a side.
        metadata: what the file says of itself.
        properties: the same in OpenSlide's words, and all that scanner and lab wrote.
        is_plain: as of ``TiffReader``.
    """

    is_plain = False

    def __init__(self, path: Path, icc_profile: bytes | None = None, skip_damaged: bool = False) -> None:
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

    def close(self) -> None:
        """Closes the files."""
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


def _open(path: Path) -> Any:
    import openslide

    slide = openslide.OpenSlide(path)
    slide.set_cache(openslide.OpenSlideCache(_CACHE))
    return slide
