"""The tissue of a slide as a dataset of normalized tiles."""

from __future__ import annotations

import copy
import functools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from stainnorm_transform.files import version
from stainnorm_transform.resources import cores, safe_after_fork
from stainnorm_transform.slides.reader import Slide
from stainnorm_transform.slides.sampling import slide_normalizer, tissue_shares
from stainnorm_transform.transform import NormalizeStain

# Slides that the datasets of a process keep open: those read last.
OPEN_SLIDES = 8


class SlideTiles(Dataset[dict[str, Any]]):
    """The tissue of a slide as normalized tiles, side by side, for a data loader: nothing is written.

    Every item is a dict of ``image``, uint8 (3, side, side); ``x`` and ``y``, its upper left corner in pixels of
    level 0; and ``level``, which it was read from. Tiles that are not whole, at the right and below, are left out.

    Args:
        path: of the slide.
        normalize: the target, of which the slide gets one map; if that is fixed, it is taken as it is. None leaves the
            colors as they are.
        side: of a tile in pixels.
        level: to read from.
        mpp: micrometers a pixel to scale to, instead of a level: 0.5 is 20x. Not much below that of the slide.
        min_tissue: share of a tile that must be tissue, by its color, in [0, 1]; 0 takes every tile.
        to_srgb: as for ``Slide``.

    Attributes:
        normalize: the transform of the slide, with its map, or None.
        corners: (x, y) of each tile, in pixels of level 0.
        side_level0: side of a tile in pixels of level 0.
        level: that tiles are read from.

    Raises:
        ValueError: there is no such level, or ``mpp`` is asked for of a slide that has none; and as for ``Slide``. Of a
            tile: it is damaged, or the file has changed since.

    Example::

        tiles = SlideTiles("slide.svs", NormalizeStain.pretrained(), side=224, mpp=0.5)
        for batch in DataLoader(tiles, batch_size=64, num_workers=4):
            features = model(v2.functional.to_dtype(batch["image"], torch.float32, scale=True))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        normalize: NormalizeStain | None,
        side: int = 256,
        level: int = 0,
        mpp: float | None = None,
        min_tissue: float = 0.25,
        to_srgb: bool = False,
    ) -> None:
        if side < 1:
            raise ValueError(f"expected a side of 1 pixel or more, got {side}")
        if not 0 <= min_tissue <= 1:
            raise ValueError(f"expected a share of tissue in [0, 1], got {min_tissue}")
        if level and mpp is not None:
            raise ValueError(f"expected a level or an mpp, got both: {level} and {mpp}")
        self.path, self.side, self.to_srgb = Path(path).absolute(), side, to_srgb
        self._version = version(self.path.stat())
        with Slide(self.path, to_srgb) as slide:
            self._choose(slide, normalize, level, mpp, min_tissue)

    def _choose(
        self, slide: Slide, normalize: NormalizeStain | None, level: int, mpp: float | None, min_tissue: float
    ) -> None:
        if not 0 <= level < len(slide.level_dimensions):
            raise ValueError(f"expected a level from 0 to {len(slide.level_dimensions) - 1}, got {level}")
        downsample = slide.level_downsamples[level]
        if mpp is not None:
            if slide.mpp is None:
                raise ValueError(f"{self.path} does not say its resolution: choose a level instead of mpp={mpp}")
            if not 0 < mpp < math.inf:
                raise ValueError(f"expected micrometers a pixel above 0, got {mpp}")
            downsample = mpp / math.sqrt(slide.mpp[0] * slide.mpp[1])
            if downsample < 0.9:
                raise ValueError(f"expected mpp as large as that of the slide, {slide.mpp[0]:g}, or larger, got {mpp}")
            level = slide.level_for(downsample)
        self.level = level
        self._read_side = max(1, round(self.side * downsample / slide.level_downsamples[level]))
        self.side_level0 = self.side * downsample
        self.normalize = None
        if normalize is not None:
            # Images are on the CPU.
            self.normalize = copy.deepcopy(slide_normalizer(slide, normalize).normalize).cpu()
        rows, columns = np.nonzero(tissue_shares(slide, self.side_level0, cores()) >= min_tissue)
        self.corners = [
            (round(column * self.side_level0), round(row * self.side_level0))
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = self.corners[index]
        try:
            image = self._slide().read(x, y, self._read_side, self._read_side, self.level)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        if self._read_side != self.side:
            whole = Image.fromarray(image.permute(1, 2, 0).numpy())
            image = pil_to_tensor(whole.resize((self.side, self.side), Image.Resampling.BICUBIC))
        with safe_after_fork():
            if self.normalize is not None:
                image = self.normalize(image)
            return {"image": image.contiguous(), "x": x, "y": y, "level": self.level}

    def _slide(self) -> Slide:
        found = self.path.stat()
        if version(found) != self._version:
            raise ValueError("the file has changed since this dataset was made: make it again")
        return _open(os.getpid(), self.path, (found.st_dev, found.st_ino, *self._version), self.to_srgb)


# A fork must not read by the handles of its parent, nor anyone by those of a file that was replaced.
@functools.lru_cache(maxsize=OPEN_SLIDES)
def _open(process: int, path: Path, file: tuple[int, ...], to_srgb: bool) -> Slide:
    return Slide(path, to_srgb)
