"""Color arithmetic: the a*, b* shift, computed straight in RGB."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Linear sRGB -> CIE XYZ (ITU-R BT.709 primaries) and the D65 white point, rounded as in kornia and scikit-image: an
# offset estimated in their Lab is then exactly that offset here. White as the row sums differs by up to 2e-4 in RGB.
_RGB_TO_XYZ = torch.tensor(
    [
        [0.412453, 0.357580, 0.180423],
        [0.212671, 0.715160, 0.072169],
        [0.019334, 0.119193, 0.950227],
    ],
    dtype=torch.float64,
)
_WHITE = torch.tensor([0.95047, 1.0, 1.08883], dtype=torch.float64)
_TO_RELATIVE_XYZ = _RGB_TO_XYZ / _WHITE[:, None]
_M = _TO_RELATIVE_XYZ.tolist()
_M_INV = torch.linalg.inv(_TO_RELATIVE_XYZ).tolist()

# CIE 15:2004: L* = 116 f(Y) - 16, a* = 500 (f(X) - f(Y)), b* = 200 (f(Y) - f(Z)); f is a cube root above EPSILON and
# the line (KAPPA t + 16) / 116 below it. The exact fractions make both pieces meet.
EPSILON = 216 / 24389
KAPPA = 24389 / 27
_F_KNEE = 6 / 29

# IEC 61966-2-1.
_SRGB_KNEE = 0.04045
_LINEAR_KNEE = 0.0031308

# Tissue up to L* = 60 takes the full offset, white glass from L* = 97 none: between labs, the color of paler tissue
# differs the less, in proportion.
FULL_LIGHTNESS, WHITE_LIGHTNESS = 60.0, 97.0

# Rows are worked in strips of about this many pixels on the CPU, so that temporaries stay in cache.
_STRIP_PIXELS = 1 << 16


def shift_ab(image: Tensor, offset: Tensor, preserve_white: bool = True) -> Tensor:
    """Adds an offset to a* and b* of sRGB images; the Lab image is never formed.

    L* is a function of relative luminance Y alone, so moving (a*, b*) at constant L* only moves f(X) by
    ``w * da / 500`` and f(Z) by ``-w * db / 200``. With ``preserve_white`` the offset fades out towards white glass
    by ``w = clamp((97 - L*) / 37, 0, 1)``; otherwise ``w = 1``. Inside the sRGB gamut, shifting by ``offset`` and
    then by ``-offset`` restores the image; outside it, RGB is clamped to [0, 1].

    Differentiable in ``image`` (floating point) and ``offset``. On the CPU the result for an image does not depend,
    to the last bit, on the batch it is in.

    Args:
        image: sRGB, shape (..., 3, H, W), uint8 or floating point in [0, 1]. NaN pixels stay NaN.
        offset: (da, db) in CIELAB units (D65, 2 degree observer), shape (2,) for all images or (..., 2) with the
            leading dimensions of ``image``.
        preserve_white: whether to fade the offset out from L* = 60 to L* = 97.

    Returns:
        sRGB of the shape, dtype, device and memory format of ``image``. float64 is computed in float64, every other
        dtype in float32.

    Raises:
        TypeError: ``image`` is neither uint8 nor floating point.
        ValueError: the shapes do not fit the rules above.

    Example:
        >>> pink = torch.tensor([0.9, 0.6, 0.7]).view(3, 1, 1)
        >>> bluer = shift_ab(pink, torch.tensor([0.0, -10.0]))
        >>> [round(value, 2) for value in bluer.flatten().tolist()]
        [0.88, 0.6, 0.75]
    """
    check_image(image)
    leading = image.shape[:-3]
    if offset.shape[-1:] != (2,) or offset.shape[:-1] not in ((), leading):
        raise ValueError(
            f"expected an offset of shape (2,) or {(*leading, 2)} for an image of shape {tuple(image.shape)}, "
            f"got {tuple(offset.shape)}"
        )

    def one_batch(batch: Tensor, offsets: Tensor) -> Tensor:
        if not _eager_on_cpu(batch):
            return shift_batch(batch, offsets, preserve_white)
        rows = max(1, _STRIP_PIXELS // batch.shape[-1])
        strips = (batch[..., top : top + rows, :] for top in range(0, batch.shape[-2], rows))
        return torch.cat([shift_batch(strip, offsets, preserve_white) for strip in strips], dim=-2)

    out = one_by_one(one_batch, image, offset.expand(*leading, 2))
    return out if out.stride() == image.stride() else torch.empty_like(image).copy_(out)


def random_offset(shape: Sequence[int], max_offset: float, generator: torch.Generator | None = None) -> Tensor:
    """(da, db) uniform in [-max_offset, max_offset], independently: shape (*shape, 2)."""
    return (2 * torch.rand(*shape, 2, generator=generator) - 1) * max_offset


def check_image(image: Tensor) -> None:
    """Raises TypeError or ValueError unless ``image`` is uint8 or floating point of shape (..., 3, H, W)."""
    if not isinstance(image, Tensor):
        raise TypeError(f"expected a tensor, got {type(image).__name__}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"expected uint8 in [0, 255] or floating point in [0, 1], got {image.dtype}")
    if image.ndim < 3 or image.shape[-3] != 3 or 0 in image.shape[-2:]:
        raise ValueError(f"expected an image of shape (..., 3, H, W) with H, W >= 1, got {tuple(image.shape)}")


def one_by_one(function: Callable[..., Tensor], image: Tensor, *rows: Tensor) -> Tensor:
    """Applies a function of batches to images of any leading dimensions; in eager mode on the CPU to one at a time.

    There, a vectorized kernel may round an image differently at another place in a batch, and large temporaries
    leave the cache.

    Args:
        function: takes (N, 3, H, W) and for each of ``rows`` (N, K), and returns (N, ...).
        image: shape (..., 3, H, W).
        rows: shape (..., K), with the leading dimensions of ``image``.
    """
    leading = image.shape[:-3]
    count = math.prod(leading)
    batch = image.reshape(count, *image.shape[-3:])
    flat = [row.reshape(count, row.shape[-1]) for row in rows]
    if _eager_on_cpu(image) and count > 1:
        out = torch.cat([function(*(rows[i : i + 1] for rows in (batch, *flat))) for i in range(count)])
    else:
        out = function(batch, *flat)
    return out.reshape(*leading, *out.shape[1:])


def _eager_on_cpu(image: Tensor) -> bool:
    return image.device.type == "cpu" and not torch.compiler.is_compiling()


def shift_batch(image: Tensor, offset: Tensor, preserve_white: bool) -> Tensor:
    """``shift_ab`` of images (N, 3, H, W) by offsets (N, 2), unchecked, all at once: faster for many small ones."""
    work = image.to(torch.promote_types(image.dtype, torch.float32))
    if image.dtype == torch.uint8:
        work = work / 255
    offset = offset.to(work)[..., None, None]
    red, green, blue = _decode(work).unbind(-3)
    fx, fy, fz = (_f(x * red + y * green + z * blue) for x, y, z in _M)
    d_fx, d_fz = offset[..., 0, :, :] / 500, offset[..., 1, :, :] / -200
    if preserve_white:
        lightness = 116 * fy - 16
        weight = ((WHITE_LIGHTNESS - lightness) / (WHITE_LIGHTNESS - FULL_LIGHTNESS)).clamp(0, 1)
        d_fx, d_fz = weight * d_fx, weight * d_fz
    # As in kornia and scikit-image, f(Z) stops at 0.
    x, y, z = _f_inverse(fx + d_fx), _f_inverse(fy), _f_inverse((fz + d_fz).clamp(min=0))
    linear = torch.stack([r * x + g * y + b * z for r, g, b in _M_INV], dim=-3)
    out = _encode(linear.clamp(0, 1))
    return (out * 255).round().to(torch.uint8) if image.dtype == torch.uint8 else out.to(image.dtype)


# Each clamp keeps the branch that torch.where does not take finite, and with it the gradient.
def _decode(value: Tensor) -> Tensor:
    curve = ((value.clamp(min=_SRGB_KNEE) + 0.055) / 1.055) ** 2.4
    return torch.where(value > _SRGB_KNEE, curve, value / 12.92)


def _encode(value: Tensor) -> Tensor:
    curve = 1.055 * value.clamp(min=_LINEAR_KNEE) ** (1 / 2.4) - 0.055
    return torch.where(value > _LINEAR_KNEE, curve, 12.92 * value)


def _f(t: Tensor) -> Tensor:
    return torch.where(t > EPSILON, t.clamp(min=EPSILON) ** (1 / 3), (KAPPA * t + 16) / 116)


def _f_inverse(f: Tensor) -> Tensor:
    return torch.where(f > _F_KNEE, f**3, (116 * f - 16) / KAPPA)
