"""From an image to its color map: a small copy, its tissue, and the fit of the network's output over the tissue."""

from __future__ import annotations

import functools
import itertools
import math
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from stainnorm_transform.color import (
    as_map,
    bounded,
    color_terms,
    fade,
    one_by_one,
    rgb_to_lab,
    without_autocast,
)
from stainnorm_transform.eager import is_eager
from stainnorm_transform.network import ColorNormNet, FrozenColorNormNet

Network: TypeAlias = ColorNormNet | FrozenColorNormNet

# The network sees an area-downsampled copy: down to this many pixels on the longer side, but by a scale within SCALES.
# Strips are not seen smaller for being over LONGEST times as long as wide.
COPY_SIDE = 64
SCALES = (2, 16)
LONGEST = 4

# Large images are read in strips of about this many pixels, so that no copy of the whole is made.
_STRIP_PIXELS = 1 << 18
# On CUDA, strips have about this many pixels over the whole batch.
_CUDA_STRIP_PIXELS = 1 << 24

# Tissue is neither white glass nor black, ...
TISSUE_LIGHTNESS = (10.0, 88.0)
# ... not grey (in a*, b* chroma), ...
TISSUE_CHROMA = 5.0
# ... and textured: the mean deviation of L* from its 3 x 3 mean, relative to darkness (100 - L*), over a 9 x 9
# neighborhood. Strokes of a pen stay below it.
TISSUE_TEXTURE = 0.03
# An image with a smaller share of tissue than this has none: dust, a cover slip's edge.
TISSUE_SHARE = 0.02
# Added to the variances of the tissue's colors, in the units of a map: where colors hardly differ, slopes fade to 0.
RIDGE = 0.02
# Tiles of a slide are usually this far from the median, in Lab units, or more; far ones this many times as far.
OUTLIER_SPREAD = 1.0
OUTLIER = 4.0


def tissue_sums(network: Network, image: Tensor, preserve_white: bool = True, dense: bool = False) -> Tensor:
    """What a color map is fitted to, of each image; sums of several, in proportion to their pixels, make one map.

    The network's output for a pixel of color z (see ``color_terms``), which takes the share w of a shift, is about
    ``w B z`` for a map B. Dark tissue weighs more: the color of its dense stain varies least from slide to slide.

    Args:
        network: a trained ColorNormNet in eval mode, or a FrozenColorNormNet.
        image: sRGB, shape (..., 3, H, W), uint8 or floating point in [0, 1]. NaN counts as white.
        preserve_white: as the network was trained.
        dense: whether every pixel counts: the copies that begin at each pixel of the first small copy.

    Returns:
        Means over the image, weighted by tissue, of the products of w z with w z and with the output (a*, b*): shape
        (..., 6, 4), float32, all 0 without tissue.
    """
    if not dense:
        return _sums_of(network, image, preserve_white)
    side = _side(image)
    corners = (range(min(-(-side // COPY_SIDE), length)) for length in image.shape[-2:])
    total = torch.zeros(*image.shape[:-3], 6, 4, dtype=torch.float32, device=image.device)
    seen = 0
    for top, left in itertools.product(*corners):
        window = image[..., top:, left:]
        pixels = math.prod(_length(length, side) for length in window.shape[-2:])
        total += pixels * _sums_of(network, window, preserve_white, side)
        seen += pixels
    return total / seen


def map_of(sums: Tensor, slopes: bool = True) -> Tensor:
    """The color map that fits ``tissue_sums`` best: (..., 2, 4), see ``color.shift_ab``, 0 where there is no tissue.

    It is a ridge regression, whose slopes are bounded. Without ``slopes`` it is the offset alone.
    """
    moments = _moments(sums)
    mean, offset = moments[..., :1, 1:], moments[..., 4:, :1]
    if not slopes:
        return as_map(offset[..., 0])
    covariance = moments[..., 1:4, 1:] - mean.mT * mean
    covariance = covariance + RIDGE * torch.eye(3, dtype=sums.dtype, device=sums.device)
    # The inverse by cross products, which every exporter knows and no device has to wait for: the rows of cofactors are
    # those of the two rows that follow.
    first, second, third = covariance.unbind(-2)
    following = torch.stack([second, third, first], dim=-2)
    cofactors = torch.linalg.cross(following, torch.stack([third, first, second], dim=-2))
    determinant = (first * cofactors[..., 0, :]).sum(dim=-1)[..., None, None]
    # No matrix product, which may be computed in less than float32. The inverse is symmetric.
    inverse = (cofactors / determinant)[..., None, :, :]
    fitted = bounded(((moments[..., 4:, 1:] - offset * mean)[..., None, :] * inverse).sum(dim=-1))
    constant = offset - (fitted * mean).sum(dim=-1, keepdim=True)
    return torch.cat([constant, fitted], dim=-1)


def offset_of(sums: Tensor) -> Tensor:
    """What the map of ``tissue_sums`` does to the mean color of the tissue: (..., 2), and 0 where there is none."""
    return _moments(sums)[..., 4:, 0]


def mean_terms(sums: Tensor) -> Tensor:
    """Z (see ``color_terms``) of the mean color of the tissue: (..., 4); that of the first column of a map without."""
    return F.pad(_moments(sums)[..., 0, 1:], (1, 0), value=1.0)


def _moments(sums: Tensor) -> Tensor:
    weight = sums[..., :1, :1]
    return torch.where(weight > 0, sums / weight.clamp(min=1e-9), 0)


def robust_sum(sums: Tensor) -> Tensor:
    """Of the ``tissue_sums`` of many tiles of a slide, (N, 6, 4), the sum of those that count: (6, 4)."""
    return without_outliers(sums).sum(dim=0)


def without_outliers(sums: Tensor) -> Tensor:
    """Of the ``tissue_sums`` of many tiles of a slide, (N, 6, 4), those that count: (M, 6, 4).

    Tiles without tissue do not, nor those whose own offset is far from the median of all, more than OUTLIER times as
    far as is usual in the slide: pen on tissue, folds, dirt.
    """
    sums = sums[sums[:, 0, 0] > 0]
    if len(sums):
        offsets = offset_of(sums)
        distance = (offsets - offsets.median(dim=0).values).norm(dim=1)
        sums = sums[distance <= OUTLIER * distance.median().clamp(min=OUTLIER_SPREAD)]
    return sums


def standard_error_of(sums: Tensor) -> Tensor:
    """The standard error of the offset of a slide, in Lab units, from how far its tiles disagree: ().

    The offset o is the mean of the tiles' own offsets o_i (a*, b*), weighted by their tissue w_i. By the formula for a
    ratio of means (Cochran, Sampling Techniques, 1977, chapter 6), its standard error, of a* and b* together, is
    ``sqrt(n / (n - 1) * sum(w_i^2 |o_i - o|^2)) / sum(w_i)``.

    It is that of n tiles drawn at random from a slide of very many. Those of a slide are spread evenly, so the error is
    rather smaller. What all tiles have in common, such as an organ that the network does not know, does not show.

    Args:
        sums: ``tissue_sums`` of the tiles that count, (n, 6, 4), each with tissue.

    Returns:
        NaN for fewer than two tiles.
    """
    count, weight = len(sums), sums[:, 0, 0]
    if count < 2:
        return torch.full((), math.nan)
    apart = weight * (offset_of(sums) - offset_of(sums.sum(dim=0))).norm(dim=1)
    return (count / (count - 1)) ** 0.5 * apart.norm() / weight.sum()


def _sums_of(network: Network, image: Tensor, preserve_white: bool, side: int | None = None) -> Tensor:
    def one_batch(batch: Tensor) -> Tensor:
        return sums_of_copies(network, small_copy(batch, side), preserve_white)

    with without_autocast(image):
        return one_by_one(one_batch, image)


def sums_of_copies(network: Network, copies: Tensor, preserve_white: bool = True) -> Tensor:
    """As ``tissue_sums``, for what ``small_copy`` returned."""
    lab = rgb_to_lab(copies)
    weight = tissue_weight(lab)
    weight = weight * _enough(weight)
    terms = color_terms(lab)
    if preserve_white:
        terms = terms * fade(lab[:, :1])
    values = torch.cat([terms, network(lab)[:, 1:]], dim=1)
    # The order of a float64 sum does not show in float32; mps has none.
    dtype = torch.float32 if lab.device.type == "mps" else torch.float64
    products = (weight * values).flatten(2).to(dtype) @ terms.flatten(2).to(dtype).mT
    return (products / (lab.shape[-2] * lab.shape[-1])).float()


def has_tissue(copies: Tensor) -> Tensor:
    """Whether images have enough tissue for an estimate: (N,), for what ``small_copy`` returned."""
    return _enough(tissue_weight(rgb_to_lab(copies))).flatten()


def _enough(weight: Tensor) -> Tensor:
    return (weight > 0).float().mean(dim=(-1, -2), keepdim=True) >= TISSUE_SHARE


def small_copy(image: Tensor, side: int | None = None) -> Tensor:
    """Float32 copy of (N, 3, H, W) in [0, 1], COPY_SIDE pixels for each ``side`` (default: see ``_side``)."""
    return _area_mean(image, side or _side(image))


def unit_range(image: Tensor) -> Tensor:
    """Float32 in [0, 1], without NaN."""
    if image.is_floating_point():
        return torch.nan_to_num(image.float(), nan=1.0, posinf=1.0, neginf=0.0).clamp(0, 1)
    return image.float() / 255


def _side(image: Tensor) -> int:
    """Length of which COPY_SIDE pixels are made: the longer side of the image, within limits."""
    # Lengths may be symbols, on which torch.compile and torch.export must not branch.
    height, width = image.shape[-2:]
    least, most = SCALES
    longer = _smaller(_larger(height, width), COPY_SIDE * most)
    return _larger(_smaller(longer, LONGEST * _smaller(height, width)), COPY_SIDE * least)


def _length(length: int, side: int) -> int:
    """That of the copy."""
    return _larger(length * COPY_SIDE // side, 1)


def _larger(a: int, b: int) -> int:
    # sym_max of plain numbers breaks the graph of torch.compile before torch 2.7, and max that of torch.export.
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_max(a, b)


def _smaller(a: int, b: int) -> int:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_min(a, b)


def _area_mean(image: Tensor, side: int) -> Tensor:
    """Smaller by ``side / COPY_SIDE``: a pixel is the mean of what it covers, of which parts of pixels count in part.

    What is left over at the right and the bottom is left out; a side shorter than one pixel becomes one pixel.
    """
    if not torch.compiler.is_compiling() and side % COPY_SIDE == 0:
        return _block_mean(image, side // COPY_SIDE)
    image = unit_range(image)
    rows, columns = (_windows(length, side, image.device) for length in image.shape[-2:])
    return rows @ image @ columns.T


def _windows(length: int, side: int, device: torch.device) -> Tensor:
    """The share that each of ``length`` pixels has in each pixel of ``_area_mean``: (smaller length, length)."""
    # In units of 1 / COPY_SIDE of a pixel, which are whole numbers.
    start = side * torch.arange(_length(length, side), device=device)[:, None]
    pixel = COPY_SIDE * torch.arange(length, device=device)
    covered = torch.minimum(start + side, pixel + COPY_SIDE) - torch.maximum(start, pixel)
    share = covered.clamp(min=0).float()
    return share / share.sum(dim=-1, keepdim=True)


def _block_mean(image: Tensor, block: int) -> Tensor:
    """``_area_mean`` for whole steps, several times as fast on the CPU."""
    height, width = (min(block, length) for length in image.shape[-2:])
    image = image[..., : image.shape[-2] // height * height, : image.shape[-1] // width * width]

    def mean(strip: Tensor) -> Tensor:
        is_float = strip.is_floating_point()
        # int16 holds the sum of a column of a block of 128 pixels, int32 that of a block.
        total = unit_range(strip) if is_float else strip.short()
        total = functools.reduce(torch.add, torch.unflatten(total, -2, (-1, height)).unbind(-2))
        total = total if is_float else total.int()
        total = functools.reduce(torch.add, torch.unflatten(total, -1, (-1, width)).unbind(-1))
        return total.float() / (height * width * (1 if is_float else 255))

    if not is_eager(image):
        return mean(image)
    pixels = _STRIP_PIXELS if image.device.type == "cpu" else _CUDA_STRIP_PIXELS // max(1, len(image))
    strips = torch.split(image, height * max(1, pixels // (height * image.shape[-1])), dim=-2)
    return torch.cat([mean(strip) for strip in strips], dim=-2)


def tissue_weight(lab: Tensor) -> Tensor:
    """How much each pixel of a Lab image (N, 3, H, W) counts: (N, 1, H, W), in [0, 1].

    Tissue counts the more the darker it is; glass, black, grey and pen count nothing.
    """
    with without_autocast(lab):
        lightness, chroma = lab[:, :1], lab[:, 1:2] ** 2 + lab[:, 2:] ** 2
        local_mean = F.avg_pool2d(lightness, 3, stride=1, padding=1, count_include_pad=False)
        textured = _box_sum((lightness - local_mean).abs() + TISSUE_TEXTURE * (lightness - 100), 9) > 0
        low, high = TISSUE_LIGHTNESS
        tissue = (lightness > low) & (chroma > TISSUE_CHROMA**2) & textured
        return tissue * ((high - lightness) / (high - low)).clamp(0, 1)


def _box_sum(image: Tensor, size: int) -> Tensor:
    column = torch.ones(1, 1, size, 1, dtype=image.dtype, device=image.device)
    sums = F.conv2d(image, column, padding=(size // 2, 0))
    return F.conv2d(sums, column.transpose(2, 3), padding=(0, size // 2))
