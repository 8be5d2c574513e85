"""From an image to its offset: a small copy, its tissue, and the mean of the network's map over the tissue."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_lab
from torch import Tensor

from stainnorm_transform.color import one_by_one
from stainnorm_transform.network import ColorNormNet

# The network sees an area-downsampled copy: down to this many pixels on the longer side, but by MAX_SCALE at most.
COPY_SIDE = 128
MAX_SCALE = 8.0

# Tissue is neither white glass nor black, ...
TISSUE_LIGHTNESS = (10.0, 88.0)
# ... not grey (in a*, b* chroma), ...
TISSUE_CHROMA = 5.0
# ... and textured: the mean deviation of L* from its 3 x 3 mean, relative to darkness (100 - L*), over a 9 x 9
# neighborhood. Strokes of a pen stay below it.
TISSUE_TEXTURE = 0.02
# An image with a smaller share of tissue than this has none: dust, a cover slip's edge.
TISSUE_SHARE = 0.02
# Dark tissue weighs more, by this power: the color of its dense stain varies least from slide to slide of one lab.
DARKNESS_POWER = 2.0


def estimate_offset(network: ColorNormNet, image: Tensor) -> Tensor:
    """Estimates how far images are from the network's target: the weighted mean of its map over the tissue.

    Args:
        network: a trained ColorNormNet in eval mode.
        image: sRGB, shape (..., 3, H, W), uint8 or floating point in [0, 1]. NaN counts as white.

    Returns:
        (0, a*, b*) in Lab units, shape (..., 3), float32. L* is never moved. Exactly 0 for an image without tissue.
    """
    return mean_offset(tissue_sums(network, image))


def mean_offset(sums: Tensor) -> Tensor:
    """(0, a*, b*) from the sums of ``tissue_sums``: (..., 3), and 0 where there is no tissue."""
    values, weight = sums[..., :2], sums[..., 2:]
    return F.pad(torch.where(weight > 0, values / weight.clamp(min=1e-9), 0), (1, 0))


def tissue_sums(network: ColorNormNet, image: Tensor) -> Tensor:
    """Weighted a* and b* of the map and the weight, as means over each image: (..., 3), all 0 without tissue."""

    def one_batch(batch: Tensor) -> Tensor:
        return sums_of_copies(network, small_copy(batch))

    with torch.autocast(image.device.type, enabled=False):
        return one_by_one(one_batch, image)


def sums_of_copies(network: ColorNormNet, copies: Tensor) -> Tensor:
    """As ``tissue_sums``, for what ``small_copy`` returned."""
    lab = rgb_to_lab(copies)
    weight = tissue_weight(lab)
    weight = torch.where(_enough(weight), weight, 0)
    weighted = weight * torch.cat([network(lab)[:, 1:], torch.ones_like(weight)], dim=1)
    # The order of a float64 sum does not show in float32; mps has none.
    precise = weighted if weighted.device.type == "mps" else weighted.double()
    return precise.mean(dim=(-1, -2)).float()


def has_tissue(copies: Tensor) -> Tensor:
    """Whether images have enough tissue for an estimate: (N,), for what ``small_copy`` returned."""
    return _enough(tissue_weight(rgb_to_lab(copies))).flatten()


def _enough(weight: Tensor) -> Tensor:
    return (weight > 0).float().mean(dim=(-1, -2), keepdim=True) >= TISSUE_SHARE


def small_copy(image: Tensor, scale: float | None = None) -> Tensor:
    """Float32 copy of (N, 3, H, W), smaller by ``scale``, each pixel the mean over its area."""
    height, width = image.shape[-2:]
    if scale is None:
        scale = min(max(height, width, COPY_SIDE) / COPY_SIDE, MAX_SCALE)
    size = (max(1, round(height / scale)), max(1, round(width / scale)))
    copy = image.float()
    if image.is_floating_point():
        copy = torch.nan_to_num(copy, nan=1.0, posinf=1.0, neginf=0.0).clamp(0, 1)
    copy = F.interpolate(copy, size=size, mode="area") if size != (height, width) else copy
    return copy if image.is_floating_point() else copy / 255


def tissue_weight(lab: Tensor) -> Tensor:
    """How much each pixel of a Lab image (N, 3, H, W) counts: (N, 1, H, W), in [0, 1].

    Tissue counts the more the darker it is; glass, black, grey and pen count nothing.
    """
    lightness, chroma = lab[:, :1], lab[:, 1:].norm(dim=1, keepdim=True)
    texture = _box_mean((lightness - _box_mean(lightness, 3)).abs(), 9)
    darkness = _box_mean(100 - lightness, 9)
    low, high = TISSUE_LIGHTNESS
    tissue = (lightness > low) & (chroma > TISSUE_CHROMA) & (texture > TISSUE_TEXTURE * darkness)
    return tissue * ((high - lightness) / (high - low)).clamp(0, 1) ** DARKNESS_POWER


def _box_mean(image: Tensor, size: int) -> Tensor:
    mean: Tensor = F.avg_pool2d(image, size, stride=1, padding=size // 2, count_include_pad=False)
    return mean
