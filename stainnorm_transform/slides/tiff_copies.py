"""Whether an image of a TIFF shows the scan, smaller, or something else that would be lost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stainnorm_transform.slides.tiff_tiles import Level

# Blocks of this side, so many across and down, are compared; of the larger image, blocks of so many pixels at most.
_SIDE, _BLOCKS, _MOST = 16, 5, 512
# In a copy, hardly a block differs by so many levels of 255; more than this share of them shows another image.
_UNLIKE, _SHARE = 20, 1 / 8
# Sizes of copies are rounded.
_ROUNDING = 2


def is_copy(image: Level, levels: Sequence[Level]) -> bool:
    """Whether an image looks like the levels of a scan, as far as neither is damaged."""
    larger = min((level for level in levels if level.width > image.width), key=lambda level: level.width, default=None)
    if larger is None or abs(larger.height * image.width / larger.width - image.height) > _ROUNDING:
        return False
    scale = larger.width / image.width
    side = max(1, min(_SIDE, image.width, image.height, int(_MOST / scale)))
    differences = []
    for top in np.linspace(0, image.height - side, _BLOCKS).astype(int).tolist():
        for left in np.linspace(0, image.width - side, _BLOCKS).astype(int).tolist():
            small = _mean_color(image, left, top, side)
            large = _mean_color(larger, round(left * scale), round(top * scale), math.ceil(side * scale))
            if small is not None and large is not None:
                differences.append(np.abs(small - large).mean())
    return not differences or float(np.mean(np.array(differences) > _UNLIKE)) <= _SHARE


def _mean_color(level: Level, left: int, top: int, side: int) -> NDArray[np.float64] | None:
    """Of a block, or None where tiles of it are missing or damaged."""
    total, count = np.zeros(3), 0
    for tile in level.touched(left, top, side, side):
        try:
            pixels = level.tile(*tile)
        except (OSError, MemoryError):
            raise
        except Exception:  # It is found again when it is read.
            return None
        if pixels is None:
            return None
        x, y, _, _ = level.place(*tile)
        part = pixels[max(0, top - y) : top + side - y, max(0, left - x) : left + side - x, :3]
        total += part.sum((0, 1))
        count += part.shape[0] * part.shape[1]
    return total / count if count else None
