"""One color map for a slide, from a sample of its tissue."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from stainnorm_transform.color import rgb_to_lab
from stainnorm_transform.estimate import (
    TISSUE_CHROMA,
    TISSUE_LIGHTNESS,
    map_of,
    offset_of,
    standard_error_of,
    tissue_sums,
    without_outliers,
)
from stainnorm_transform.resources import cores, in_order, one_torch_thread, safe_after_fork
from stainnorm_transform.slides.reader import Slide
from stainnorm_transform.transform import NormalizeStain

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


class SlideNormalizer(NamedTuple):
    """What ``slide_normalizer`` found.

    Attributes:
        normalize: the transform of the slide, with one fixed map.
        offset: what it takes away from the mean color of the tissue, (2,) a*, b* in Lab units; of a map that was fixed
            before, from a usual color.
        tiles: how many tiles with tissue it is based on; None if the map was fixed before.
        standard_error: of the offset, in Lab units, see ``estimate.standard_error_of``; None for fewer than two tiles.
        left_out: how many tiles with tissue do not count, as their color is far from that of most others; they do not
            show in the standard error. None if the map was fixed before.
    """

    normalize: NormalizeStain
    offset: Tensor
    tiles: int | None
    standard_error: float | None
    left_out: int | None


def slide_normalizer(slide: Slide, normalize: NormalizeStain, threads: int | None = None) -> SlideNormalizer:
    """The transform of a slide: ``normalize.for_slide`` of a sample of its tissue, spread evenly and always the same.

    Tissue is sought on a small level, where there is one. Tiles whose color is far from that of most others, by pen,
    folds or dirt, do not count.

    Args:
        slide: an open slide.
        normalize: the target; if its map is fixed, it is the transform of the slide.
        threads: to read and estimate with; default: as many as there are cores.

    Returns:
        The transform, which takes away nothing where no tissue was found, and what it is based on.
    """
    if normalize.fixed_map is not None:
        return SlideNormalizer(normalize, normalize.fixed_map[:, 0], None, None, None)
    threads = threads or cores()
    side = sampled_side(slide)
    device = normalize.network.device
    sums: list[Tensor] = []

    def sums_at(corner: tuple[int, int]) -> Tensor:
        size = (min(side, slide.dimensions[0]), min(side, slide.dimensions[1]))
        # The modes of torch are those of a thread.
        with torch.inference_mode():
            return tissue_sums(normalize.network, slide.read(*corner, *size).to(device), normalize.preserve_white)

    chosen = itertools.islice(places(slide, side, threads), SAMPLED_PLACES)
    with one_torch_thread(), contextlib.closing(in_order(sums_at, chosen, threads)) as tiles:
        for found in tiles:
            if found[0, 0] > 0:
                sums.append(found)
            if len(sums) == SAMPLED_TILES:
                break
    counted = without_outliers(torch.stack(sums) if sums else torch.zeros(0, 6, 4, device=device))
    total = counted.sum(dim=0)
    fixed = normalize.with_map(map_of(total, normalize.slopes))
    error = float(standard_error_of(counted)) if len(counted) > 1 else None
    return SlideNormalizer(fixed, offset_of(total), len(counted), error, len(sums) - len(counted))


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
    with safe_after_fork():
        lab = rgb_to_lab(torch.from_numpy(small[..., :3]).permute(2, 0, 1)[None] / 255)
        low, high = TISSUE_LIGHTNESS
        colored = lab[:, 1:2] ** 2 + lab[:, 2:] ** 2 > TISSUE_CHROMA**2
        tissue = (colored & (lab[:, :1] > low) & (lab[:, :1] < high)).float()
        whole = tissue[..., : max(1, round(rows * side / scale)), : max(1, round(columns * side / scale))]
        shares: NDArray[np.float32] = F.adaptive_avg_pool2d(whole, (rows, columns))[0, 0].numpy()
    return shares
