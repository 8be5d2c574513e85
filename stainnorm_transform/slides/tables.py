"""Colors of pixels (H, W, 4), by tables of all 2**24 colors and without."""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms
from torch import Tensor

from stainnorm_transform.color import TABLE_SIZE, shift_ab
from stainnorm_transform.files import one_line

Pixels = NDArray[np.uint8]
_STRIP_PIXELS = 1 << 16


def look_up_pixels(pixels: Pixels, table: NDArray[np.int32]) -> Pixels:
    """``color.look_up`` of contiguous pixels (H, W, 4); the last channel of the result is 0."""
    colors = pixels.view("<i4")[..., 0]
    out = np.empty_like(colors)
    # By strips that stay in cache: fresh memory costs more than the looking up.
    rows = max(1, _STRIP_PIXELS // colors.shape[1])
    index = np.empty((rows, colors.shape[1]), np.int32)
    for top in range(0, colors.shape[0], rows):
        strip = colors[top : top + rows]
        wanted = np.bitwise_and(strip, TABLE_SIZE - 1, out=index[: len(strip)])
        # The mode saves a look at every index, and a buffer.
        table.take(wanted, out=out[top : top + rows], mode="clip")
    return out.view(np.uint8).reshape(pixels.shape)


def shift_pixels(pixels: Pixels, shift: Tensor, preserve_white: bool) -> Pixels:
    """``color.shift_ab`` of pixels (H, W, 4), without a table; the last channel of the result is 0."""
    # A channel at a time, as interleaved copies take ten times as long.
    colors = torch.from_numpy(np.stack([pixels[..., channel] for channel in range(3)]))
    out = np.zeros_like(pixels)
    for channel, moved in enumerate(shift_ab(colors, shift, preserve_white).numpy()):
        out[..., channel] = moved
    return out


def srgb_table(icc_profile: bytes) -> NDArray[np.int32]:
    """What every uint8 color is in sRGB, as ``color.shift_table``."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        convert = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), "RGB", "RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise ValueError(f"its ICC profile cannot be used: {one_line(error)}") from error
    table = np.arange(TABLE_SIZE, dtype="<i4").view(np.uint8).reshape(256, 256, 256, 4)
    for colors in table:
        converted = ImageCms.applyTransform(Image.fromarray(np.ascontiguousarray(colors[..., :3])), convert)
        colors[..., :3] = np.asarray(converted)
    return table.view("<i4").reshape(-1)
