"""Whole slides: one offset for each, and their tissue as a dataset of tiles."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from stainnorm_transform.color import rgb_to_lab
from stainnorm_transform.estimate import TISSUE_CHROMA, TISSUE_LIGHTNESS, robust_mean_offset, tissue_sums
from stainnorm_transform.slide_reader import Slide
from stainnorm_transform.threads import cores, in_order, one_torch_thread
from stainnorm_transform.transform import NormalizeStain

__all__ = ["Slide", "SlideTiles", "slide_normalizer", "tissue_shares"]

# Of a slide, the estimate sees up to this many tiles with tissue, of this side: 512 pixels at 40x.
SAMPLED_TILES = 192
SAMPLED_MICROMETERS = 128.0
SAMPLED_SIDES = (128, 1024)
# It looks for them at up to this many places; slides with small levels show beforehand where tissue is.
SAMPLED_PLACES = 8 * SAMPLED_TILES
# The map of the tissue has this many pixels to a side of a tile.
MAP_SCALE = 4
# What is 40x and 20x, where a slide only says that.
OBJECTIVE_TIMES_MPP = 10.0


def slide_normalizer(
    slide: Slide, normalize: NormalizeStain, threads: int | None = None
) -> tuple[NormalizeStain, int | None]:
    """The transform of a slide: ``normalize.for_slide`` of a sample of its tissue, spread evenly and always the same.

    Tissue is sought on a small level, where there is one. Tiles whose color is far from that of most others, by pen,
    folds or dirt, do not count.

    Args:
        slide: an open slide.
        normalize: the target; if its offset is fixed, it is the transform of the slide.
        threads: to read with; default: as many as there are cores.

    Returns:
        The transform, which takes away nothing where no tissue was found, and how many tiles with tissue it is based
        on: None if the offset was fixed before.
    """
    if normalize.offset is not None:
        return normalize, None
    threads = threads or cores()
    side = sampled_side(slide)
    device = normalize.network.device
    sums: list[Tensor] = []

    def read(corner: tuple[int, int]) -> Tensor:
        size = (min(side, slide.dimensions[0]), min(side, slide.dimensions[1]))
        return slide.read(*corner, *size)

    chosen = itertools.islice(places(slide, side, threads), SAMPLED_PLACES)
    with one_torch_thread(), torch.no_grad(), contextlib.closing(in_order(read, chosen, threads)) as tiles:
        for tile in tiles:
            found = tissue_sums(normalize.network, tile.to(device))
            if found[2] > 0:
                sums.append(found)
            if len(sums) == SAMPLED_TILES:
                break
    total = torch.stack(sums) if sums else torch.zeros(0, 3, device=device)
    return normalize.with_offset(robust_mean_offset(total)), len(sums)


def sampled_side(slide: Slide) -> int:
    """Side of a tile for the estimate, in pixels of level 0; a slide that says nothing of its scale is taken as 40x."""
    mpp = slide.mpp[0] if slide.mpp else OBJECTIVE_TIMES_MPP / (slide.objective or 40)
    low, high = SAMPLED_SIDES
    return min(max(round(SAMPLED_MICROMETERS / mpp), low), high)


def places(slide: Slide, side: int, threads: int) -> Iterator[tuple[int, int]]:
    """Corners of tiles, of those that may have tissue: first those with much, and spread evenly at any time."""
    columns, rows = (max(1, length // side) for length in slide.dimensions)
    is_small = min(slide.dimensions) < side
    # Multiples of the golden ratio, modulo 1, are spread evenly, however many there are.
    order = np.argsort(np.arange(rows * columns) * ((math.sqrt(5) - 1) / 2) % 1, kind="stable")
    if not is_small and slide.level_downsamples[slide.level_for(side / MAP_SCALE)] >= MAP_SCALE:
        share = tissue_shares(slide, side, threads).flatten()
        order = np.concatenate([order[share[order] >= 0.5], order[(share[order] > 0) & (share[order] < 0.5)]])
    for cell in order.tolist():
        yield cell % columns * side, cell // columns * side


def tissue_shares(slide: Slide, side: float, threads: int) -> NDArray[np.float32]:
    """How much of each tile is tissue, by color alone: (rows, columns), of tiles of ``side`` pixels of level 0.

    Tiles that are not whole, at the right and below, are left out.
    """
    columns, rows = (int(length / side + 1e-6) for length in slide.dimensions)
    if not columns or not rows:
        return np.zeros((0, 0), np.float32)
    small, scale = slide.reduced(max(1.0, side / MAP_SCALE), threads)
    lab = rgb_to_lab(torch.from_numpy(small[..., :3]).permute(2, 0, 1)[None] / 255)
    low, high = TISSUE_LIGHTNESS
    colored = lab[:, 1:2] ** 2 + lab[:, 2:] ** 2 > TISSUE_CHROMA**2
    tissue = (colored & (lab[:, :1] > low) & (lab[:, :1] < high)).float()
    whole = tissue[..., : max(1, round(rows * side / scale)), : max(1, round(columns * side / scale))]
    shares: NDArray[np.float32] = F.adaptive_avg_pool2d(whole, (rows, columns))[0, 0].numpy()
    return shares


class SlideTiles(Dataset[dict[str, Any]]):
    """The tissue of a slide as normalized tiles, side by side, for a data loader: nothing is written.

    Every item is a dict of ``image``, uint8 (3, side, side); ``x`` and ``y``, its upper left corner in pixels of
    level 0; and ``level``, which it was read from. Tiles that are not whole, at the right and below, are left out.

    Args:
        path: of the slide.
        normalize: the target, of which the slide gets one offset; if that is fixed, it is taken as it is. None leaves
            the colors as they are.
        side: of a tile in pixels.
        level: to read from.
        mpp: micrometers a pixel to scale to, instead of a level: 0.5 is 20x. Not much below that of the slide.
        min_tissue: share of a tile that must be tissue, by its color, in [0, 1]; 0 takes every tile.
        to_srgb: as for ``Slide``.

    Attributes:
        normalize: the transform of the slide, with its offset, or None.
        corners: (x, y) of each tile, in pixels of level 0.
        side_level0: side of a tile in pixels of level 0.
        level: that tiles are read from.

    Raises:
        ValueError: there is no such level, or ``mpp`` is asked for of a slide that has none; and as for ``Slide``.

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
        self.path, self.side, self.to_srgb = Path(path), side, to_srgb
        self._slides: dict[int, Slide] = {}
        with Slide(path, to_srgb) as slide:
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
            self.normalize = copy.deepcopy(slide_normalizer(slide, normalize)[0]).cpu()
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
        if self.normalize is not None:
            image = self.normalize(image)
        return {"image": image.contiguous(), "x": x, "y": y, "level": self.level}

    def _slide(self) -> Slide:
        """The slide, opened once in each process."""
        process = os.getpid()
        if process not in self._slides:
            self._slides = {process: Slide(self.path, self.to_srgb)}
        return self._slides[process]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slides": {}}
