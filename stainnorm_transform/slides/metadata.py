"""What a slide says about itself: resolution, magnification, background and ICC profile."""

from __future__ import annotations

import math
from typing import Any, NamedTuple
from xml.etree import ElementTree

from PIL import ImageCms

from stainnorm_transform.slides.formats import Tiff

OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_MICROMETERS = {"nm": 1e-3, "µm": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}
# What is outside is no resolution of a slide.
_MPP = (0.01, 1000.0)


class Metadata(NamedTuple):
    """What a slide says.

    Attributes:
        mpp: (x, y) micrometers a pixel of level 0, or None.
        objective: magnification of the objective, or None.
        background: (R, G, B, 255) of what was not scanned; white where the slide does not say.
        icc_profile: of its colors, or None.
    """

    mpp: tuple[float, float] | None
    objective: float | None
    background: tuple[int, int, int, int]
    icc_profile: bytes | None


def describe(reader: Any, tiff: Tiff) -> Metadata:
    """The metadata of an open slide, as ``formats.open_reader`` returns it."""
    properties = reader.properties
    if tiff.ome is None:
        mpp = [_positive(properties.get(f"openslide.mpp-{axis}")) for axis in "xy"]
        objective = _positive(properties.get("openslide.objective-power"))
    else:
        mpp, objective = _ome_metadata(tiff.ome)
    x, y = (value if value is not None and _MPP[0] <= value <= _MPP[1] else None for value in mpp)
    return Metadata(
        mpp=None if x is None or y is None else (x, y),
        objective=objective,
        background=_rgba(properties.get("openslide.background-color")),
        icc_profile=tiff.icc_profile or _icc_profile(reader),
    )


def _positive(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if 0 < value < math.inf else None


def _rgba(color: object) -> tuple[int, int, int, int]:
    try:
        red, green, blue = bytes.fromhex(str(color))
    except ValueError:
        return 255, 255, 255, 255
    return red, green, blue, 255


def _ome_metadata(xml: str) -> tuple[list[float | None], float | None]:
    """Micrometers a pixel, in x and y, and magnification of the first image in OME-XML."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return [None, None], None
    pixels, used = root.find("{*}Image/{*}Pixels"), root.find("{*}Image/{*}ObjectiveSettings")
    objectives = {found.get("ID"): found for found in root.iterfind("{*}Instrument/{*}Objective")}
    # An image that does not say which has that of its only instrument.
    if used is not None:
        objectives = {name: found for name, found in objectives.items() if name == used.get("ID")}
    magnification = None
    if len(objectives) == 1:
        magnification = _positive(next(iter(objectives.values())).get("NominalMagnification"))
    mpp: list[float | None] = []
    for axis in "XY":
        size = None if pixels is None else _positive(pixels.get(f"PhysicalSize{axis}"))
        unit = _MICROMETERS.get("µm" if pixels is None else pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        mpp.append(None if size is None or unit is None else size * unit)
    return mpp, magnification


def _icc_profile(reader: Any) -> bytes | None:
    try:
        profile = getattr(reader, "color_profile", None)
        return profile.tobytes() if profile is not None else None
    except (ImageCms.PyCMSError, OSError):  # A damaged profile is of no use.
        return None
