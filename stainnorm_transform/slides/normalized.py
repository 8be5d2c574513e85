"""A slide in the colors of the target, for whatever takes an OpenSlide."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import openslide
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from stainnorm_transform.color import TABLE_SIZE
from stainnorm_transform.files import version
from stainnorm_transform.slides.reader import Slide
from stainnorm_transform.slides.sampling import slide_normalizer
from stainnorm_transform.slides.tables import Pixels, look_up_pixels, shift_pixels
from stainnorm_transform.transform import NormalizeStain


class NormalizedSlide(openslide.AbstractSlide):
    """A slide that reads as its normalized copy would, which is never written: an ``openslide.AbstractSlide``.

    All levels have the same color map. Level 0 has the pixels that ``stainnorm normalize --lossless`` writes; smaller
    levels are those of the slide itself. What was not scanned has the slide's background color; outside of the slide,
    regions are transparent. Like those of an OpenSlide, colors are as stored, and ``color_profile`` says what they
    mean.

    Reading is safe in threads, and after a fork or unpickling, as in the workers of a data loader, where the slide is
    opened again. Large slides take a table of 64 MiB, of which a process keeps the last two.

    Args:
        path: of the slide, as for ``Slide``.
        normalize: the target, for which the map of the slide is estimated; if its map is fixed, that is taken.

    Attributes:
        normalize: the transform of the slide, with its map.
        tiles: how many tiles with tissue the map is based on; None if it was fixed before.

    Raises:
        ImportError, ValueError, OSError: as for ``Slide``. Of a region: the slide is damaged there, closed, or has
            changed since it was opened first.

    Example::

        with NormalizedSlide("slide.svs", NormalizeStain.pretrained()) as slide:
            tile = slide.read_region((1000, 2000), 0, (256, 256)).convert("RGB")
    """

    def __init__(self, path: str | os.PathLike[str], normalize: NormalizeStain) -> None:
        super().__init__()
        self._path = Path(path).absolute()
        self._version = version(self._path.stat())
        self._open()
        try:
            found = slide_normalizer(self._slide, normalize)
        except BaseException:
            self.close()
            raise
        # Regions are on the CPU.
        self.normalize = found.normalize.with_map(cast(Tensor, found.normalize.fixed_map)).cpu()
        self.tiles = found.tiles
        self._is_moved = bool(cast(Tensor, self.normalize.fixed_map).any())
        self._properties = self._described(found.offset)

    @classmethod
    def detect_format(cls, filename: Any) -> str | None:
        """The scanner's format of a file, by OpenSlide, or None."""
        return openslide.OpenSlide.detect_format(filename)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._path)!r}, {self.normalize})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_slide"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if not self._is_closed:
            self._open()

    def close(self) -> None:
        """Closes the file."""
        self._is_closed = True
        self._slide.close()

    @property
    def level_count(self) -> int:
        """How many levels there are."""
        return len(self._slide.level_dimensions)

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of each level in pixels, the largest first."""
        return tuple(self._slide.level_dimensions)

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        """How many pixels of level 0 one of each level stands for, a side."""
        return tuple(self._slide.level_downsamples)

    @property
    def properties(self) -> Mapping[str, str]:
        """Those of the slide, which may tell who the patient is, and those of its map, as ``stainnorm.*``."""
        return MappingProxyType(self._properties)

    def _described(self, offset: Tensor) -> dict[str, str]:
        properties = {
            "openslide.level-count": str(self.level_count),
            "openslide.background-color": "".join(f"{value:02X}" for value in self._slide.background[:3]),
        }
        for level, ((width, height), downsample) in enumerate(
            zip(self.level_dimensions, self.level_downsamples, strict=True)
        ):
            prefix = f"openslide.level[{level}]"
            properties |= {f"{prefix}.width": str(width), f"{prefix}.height": str(height)}
            properties[f"{prefix}.downsample"] = f"{downsample:.17g}"
        if self._slide.mpp:
            properties |= {
                f"openslide.mpp-{axis}": f"{mpp:.17g}" for axis, mpp in zip("xy", self._slide.mpp, strict=True)
            }
        if self._slide.objective:
            properties["openslide.objective-power"] = f"{self._slide.objective:g}"
        properties |= self._slide.properties
        a, b = (" ".join(f"{value:.9g}" for value in row) for row in cast(Tensor, self.normalize.fixed_map).tolist())
        properties |= {"stainnorm.target": self.normalize.target, "stainnorm.map-a": a, "stainnorm.map-b": b}
        for name, value in zip("ab", offset.tolist(), strict=True):
            properties[f"stainnorm.offset-{name}"] = f"{value:.9g}"
        if self.tiles is not None:
            properties["stainnorm.tiles"] = str(self.tiles)
        return properties

    @property
    def associated_images(self) -> Mapping[str, Image.Image]:
        """The thumbnail of the slide, normalized, if it has one; not those of the label and of the whole glass."""
        found = self._here().associated_images()
        return MappingProxyType(
            {
                name: to_pil_image(self.normalize(pil_to_tensor(image))).convert("RGBA")
                for name, image in found.items()
                if name == "thumbnail"
            }
        )

    def get_best_level_for_downsample(self, downsample: float) -> int:
        """The smallest level that is not smaller than level 0 after downsampling."""
        fitting = [level for level, value in enumerate(self.level_downsamples) if value <= downsample]
        return max(fitting, default=0)

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """A region as RGBA, normalized.

        Args:
            location: (x, y) of its upper left corner, in pixels of level 0.
            level: 0 is the largest.
            size: (width, height) in pixels of ``level``.
        """
        if 0 in size:
            return Image.new("RGBA", size)
        pixels = self._normalized(self._here().pixels(*location, *size, level))
        pixels[..., 3] = 255
        self._clear_outside(pixels, location, level)
        return Image.fromarray(pixels)

    def _normalized(self, pixels: Pixels) -> Pixels:
        normalize = self.normalize
        if not self._is_moved:
            return pixels.copy()
        is_large = math.prod(self.dimensions) >= TABLE_SIZE
        table = normalize.table_for(TABLE_SIZE if is_large else pixels.size // 4)
        if table is None:
            return shift_pixels(pixels, -cast(Tensor, normalize.fixed_map), normalize.preserve_white)
        return look_up_pixels(np.ascontiguousarray(pixels), table.numpy())

    def _clear_outside(self, pixels: Pixels, location: tuple[int, int], level: int) -> None:
        """Makes pixels transparent that lie outside of the slide as a whole."""
        for axis, (start, length) in enumerate(zip(location[::-1], self.level_dimensions[level][::-1], strict=True)):
            first = start / self.level_downsamples[level]
            across = np.moveaxis(pixels, axis, 0)
            across[: max(0, math.floor(-first))] = 0
            across[max(0, math.ceil(length - first)) :] = 0

    def _open(self) -> None:
        if version(self._path.stat()) != self._version:
            raise ValueError(f"{self._path} has changed since it was opened: open it again")
        self._slide = Slide(self._path)
        self._profile = self._slide.icc_profile
        self._process = os.getpid()
        self._is_closed = False

    def _here(self) -> Slide:
        """The slide, opened in this process."""
        if self._is_closed:
            raise ValueError(f"{self._path} is closed")
        if self._process != os.getpid():
            self._open()
        return self._slide
