"""Reading the pixels of whole slides."""

from __future__ import annotations

import collections
import math
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms
from torch import Tensor

from stainnorm_transform.files import one_line
from stainnorm_transform.resources import in_order
from stainnorm_transform.slides.formats import open_reader
from stainnorm_transform.slides.tables import Pixels, look_up_pixels, srgb_table

_READ_SIDE = 1024
# Resolutions that differ by no more are the same, rounded.
_SAME = 0.02


class Slide:
    """A whole slide: Aperio, Hamamatsu, MIRAX, Philips, DICOM and what else OpenSlide reads, OME-TIFF and other TIFF.

    Reading is safe in threads. After a fork, open it again.

    Args:
        path: of the slide; of a slide of several files, the one that OpenSlide opens.
        to_srgb: whether colors are converted to sRGB by the slide's ICC profile, if it has one. Otherwise they are as
            stored, which nearly all models were trained on.
        mpp: micrometers a pixel, of a slide that does not say.
        skip_damaged: whether parts that cannot be decoded become background instead of an error: see ``damaged``.

    Attributes:
        dimensions: (width, height) in pixels, of level 0.
        level_dimensions: the same of each level.
        level_downsamples: how many pixels of level 0 one of each level stands for, a side.
        mpp: (x, y) micrometers a pixel, or None where the slide does not say.
        objective: magnification of the objective, or None.
        background: (R, G, B, 255) of what was not scanned.
        icc_profile: of the colors that are read, or None.
        properties: OpenSlide's, of the slides that it reads.
        is_plain_tiff: whether it is a TIFF of no scanner's format, without other images beside the scan.

    Raises:
        ImportError: OpenSlide, tifffile or imagecodecs is not installed.
        ValueError: it is no slide, damaged, not supported, or not 8-bit RGB, or says another resolution than ``mpp``.
        OSError: there is no such file, or it may not be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        to_srgb: bool = False,
        mpp: float | None = None,
        skip_damaged: bool = False,
    ) -> None:
        self.path = Path(path)
        self._reader = open_reader(self.path, skip_damaged)
        # Also when nobody uses it any more.
        self._close = weakref.finalize(self, self._reader.close)
        try:
            self._describe(to_srgb, mpp)
        except Exception as error:
            self.close()
            if isinstance(error, (ValueError, MemoryError)):
                raise
            raise ValueError(f"damaged slide ({one_line(error)})") from error

    def _describe(self, to_srgb: bool, mpp: float | None) -> None:
        self.level_dimensions = self._reader.level_dimensions
        self.level_downsamples = self._reader.level_downsamples
        self.dimensions = self.level_dimensions[0]
        self.is_plain_tiff = self._reader.is_plain
        self.mpp, self.objective, self.background, self.icc_profile = self._reader.metadata
        self.properties = self._reader.properties
        if mpp is not None:
            self.mpp = _agreed(self.mpp, mpp)
        self._colors: NDArray[np.int32] | None = None
        if to_srgb and self.icc_profile:
            self._colors = srgb_table(self.icc_profile)
            self.icc_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

    @property
    def damaged(self) -> list[tuple[int, int, int, int]]:
        """(x, y, width, height) of the parts of level 0 that could not be decoded and have become background so far."""
        return self._reader.damaged

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._close()

    def read(self, x: int, y: int, width: int, height: int, level: int = 0) -> Tensor:
        """A region as uint8 (3, height, width); what was not scanned has the slide's background color, or white.

        Args:
            x: of its left edge, in pixels of level 0.
            y: of its upper edge, in pixels of level 0.
            width: in pixels of ``level``.
            height: in pixels of ``level``.
            level: 0 is the largest.

        Raises:
            ValueError: there is no such level, or the slide is damaged here.
        """
        return torch.from_numpy(self.pixels(x, y, width, height, level)[..., :3].copy()).permute(2, 0, 1)

    def pixels(self, x: int, y: int, width: int, height: int, level: int = 0) -> Pixels:
        """As ``read``, as it lies in memory, read-only: (height, width, 4), of which the last channel means nothing."""
        if not 0 <= level < len(self.level_dimensions):
            raise ValueError(f"expected a level from 0 to {len(self.level_dimensions) - 1}, got {level}")
        if width < 1 or height < 1:
            raise ValueError(f"expected a region of 1 x 1 pixels or more, got {width} x {height}")
        try:
            pixels = self._reader.region(x, y, width, height, level)
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(f"damaged at x = {x}, y = {y} of {width} x {height} pixels: {one_line(error)}") from error
        if pixels[..., 3].min() < 255:
            background = Image.new("RGBA", (width, height), self.background)
            pixels = np.asarray(Image.alpha_composite(background, Image.fromarray(pixels)))
        return pixels if self._colors is None else look_up_pixels(pixels, self._colors)

    def associated_images(self) -> dict[str, Image.Image]:
        """The images of mode RGB beside the scan, by name: of the label, of the whole glass (macro), a thumbnail.

        Raises:
            ValueError: one is damaged.
        """
        try:
            return {name: image.convert("RGB") for name, image in self._reader.associated_images().items()}
        except Exception as error:
            raise ValueError(f"damaged label, macro or thumbnail image: {one_line(error)}") from error

    def thumbnail(self, side: int) -> Image.Image:
        """The whole slide with ``side`` pixels on its longer side at most, by its smallest level that has as many."""
        downsample = max(1.0, max(self.dimensions) / side)
        image, _ = self.reduced(downsample, threads=1)
        small = Image.fromarray(image[..., :3])
        small.thumbnail((side, side))
        return small

    def level_for(self, downsample: float) -> int:
        """The smallest level that has as many pixels as level 0 has after downsampling."""
        # Downsamples are ratios of rounded sizes.
        fitting = [i for i, value in enumerate(self.level_downsamples) if value <= downsample * 1.01]
        return max(fitting, key=lambda i: self.level_downsamples[i], default=0)

    def reduced(self, downsample: float, threads: int) -> tuple[Pixels, float]:
        """The whole slide (H, W, 4), smaller by about ``downsample``, piece by piece; and by how much it is."""
        level = self.level_for(downsample)
        width, height = self.level_dimensions[level]
        scale = self.level_downsamples[level]
        step = max(1, int(downsample / scale * 1.01))
        side = max(step, _READ_SIDE // step * step)
        out = np.empty((-(-height // step), -(-width // step), 4), np.uint8)

        def read(corner: tuple[int, int]) -> None:
            left, top = corner
            size = min(side, width - left), min(side, height - top)
            piece = Image.fromarray(self.pixels(round(left * scale), round(top * scale), *size, level))
            small = np.asarray(piece.reduce(step))
            out[top // step :, left // step :][: small.shape[0], : small.shape[1]] = small

        collections.deque(in_order(read, corners(width, height, side), threads), maxlen=0)
        return out, scale * step


def _agreed(said: tuple[float, float] | None, mpp: float) -> tuple[float, float]:
    """The resolution of a slide that says this, and of which we are told ``mpp``."""
    if not 0 < mpp < math.inf:
        raise ValueError(f"expected micrometers a pixel above 0, got {mpp}")
    if said is None:
        return mpp, mpp
    if any(abs(value / mpp - 1) > _SAME for value in said):
        raise ValueError(f"expected no other resolution than the slide's own, {said[0]:g} micrometers, got {mpp:g}")
    return said


def corners(width: int, height: int, side: int) -> Iterator[tuple[int, int]]:
    """(x, y) of the tiles of an image, row by row."""
    return ((x, y) for y in range(0, height, side) for x in range(0, width, side))
