"""The color map of a slide as files that viewers apply: an ICC profile, and a .cube table."""

from __future__ import annotations

import struct
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from stainnorm_transform import __version__
from stainnorm_transform.color import shift_ab
from stainnorm_transform.files import one_line
from stainnorm_transform.slides.metadata import plain_text
from stainnorm_transform.slides.reader import Slide
from stainnorm_transform.transform import NormalizeStain

# What ends a title in a .cube.
_QUOTE = '"'
# Nodes a side of a table; between them colors are interpolated.
GRID = 33
# ICC.1:2001-04: an input profile from RGB to CIELAB of 16 bits, in which L* = 100 is 0xFF00 and a*, b* = 0 are 0x8000.
_VERSION = 0x02400000
_D50 = (0.9642, 1.0, 0.8249)
_PER_L, _PER_AB, _ZERO_AB = 0xFF00 / 100, 256, 0x8000


def color_profile(slide: Slide, normalize: NormalizeStain) -> bytes:
    """An ICC profile with which the slide is shown normalized: its own profile, or sRGB, after its color map.

    Args:
        slide: an open slide, whose colors are as stored.
        normalize: the transform of ``slide_normalizer``.

    Raises:
        ValueError: the slide's own profile is damaged, or not of RGB.
    """
    import imagecodecs

    own = slide.icc_profile or imagecodecs.cms_profile("srgb")
    moved = _moved(_nodes(), normalize).astype(np.float32)
    try:
        lab = imagecodecs.cms_transform(
            moved[None], own, imagecodecs.cms_profile("lab2"), colorspace="rgb", outcolorspace="lab", outdtype="float32"
        )[0]
    except (imagecodecs.CmsError, ValueError) as error:
        raise ValueError(f"its ICC profile cannot be used: {one_line(error)}") from error
    encoded = np.stack([lab[:, 0] * _PER_L, *(lab[:, i] * _PER_AB + _ZERO_AB for i in (1, 2))], axis=1)
    table = np.clip(encoded.round(), 0, 0xFFFF).astype(">u2").tobytes()
    ramp = struct.pack(">2H", 0, 0xFFFF)
    identity = np.eye(3) * 0x10000
    matrix = struct.pack(">9i", *identity.astype(int).flatten().tolist())
    sizes = struct.pack(">4s4x4B", b"mft2", 3, 3, GRID, 0) + matrix + struct.pack(">2H", 2, 2)
    title = f"{plain_text(normalize.target, but=_QUOTE)}, stainnorm {__version__}".encode()
    white = struct.pack(">4s4x3i", b"XYZ ", *(round(value * 0x10000) for value in _D50))
    return _profile(
        {
            b"desc": struct.pack(">4s4xI", b"desc", len(title) + 1) + title + b"\0" + bytes(4 + 4 + 2 + 1 + 67),
            b"cprt": struct.pack(">4s4x", b"text") + b"CC0\0",
            b"wtpt": white,
            b"A2B0": sizes + 3 * ramp + table + 3 * ramp,
        }
    )


def color_cube(normalize: NormalizeStain) -> str:
    """The color map of a slide as a table of RGB in the .cube format: from stored to normalized colors, in [0, 1]."""
    lines = [f'TITLE "{plain_text(normalize.target, but=_QUOTE)}, stainnorm {__version__}"', f"LUT_3D_SIZE {GRID}"]
    # Red varies fastest.
    moved = _moved(_nodes()[:, ::-1].copy(), normalize)
    lines += [" ".join(f"{value:.6f}" for value in color) for color in moved.tolist()]
    return "\n".join(lines) + "\n"


def _nodes() -> NDArray[np.float64]:
    """(GRID**3, 3), of which the last column varies fastest."""
    level = np.linspace(0, 1, GRID)
    return np.stack(np.meshgrid(level, level, level, indexing="ij"), axis=-1).reshape(-1, 3)


def _moved(colors: NDArray[np.float64], normalize: NormalizeStain) -> NDArray[np.float64]:
    shift = -cast(Tensor, normalize.fixed_map).double().cpu()
    image = from_numpy(np.ascontiguousarray(colors.T))[:, None]
    moved: NDArray[np.float64] = shift_ab(image, shift, normalize.preserve_white)[:, 0].numpy().T
    return moved


def _profile(tags: dict[bytes, bytes]) -> bytes:
    """The file, of its tags."""
    start = 128 + 4 + 12 * len(tags)
    directory, content = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        directory += struct.pack(">4s2I", name, start + len(content), len(tag))
        content += tag + bytes(-len(tag) % 4)
    size = start + len(content)
    # No date, so that the same map is the same file.
    header = struct.pack(">I4xI4s4s4s12x4s", size, _VERSION, b"scnr", b"RGB ", b"Lab ", b"acsp")
    header += bytes(64 - len(header)) + struct.pack(">I3i", 0, *(round(value * 0x10000) for value in _D50))
    return header + bytes(128 - len(header)) + directory + content
