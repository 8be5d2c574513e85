"""What a slide says about itself: resolution, magnification, background and ICC profile."""

from __future__ import annotations

import math
from typing import Any, NamedTuple
from xml.etree import ElementTree

from PIL import ImageCms

OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_MICROMETERS = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}
# What is outside is no resolution of a slide.
_MPP = (0.01, 1000.0)
# Programs write resolutions of screens and paper, such as 300 dots an inch, into TIFFs that have none.
# Those are in dots an inch, up to 2400.
_COARSEST_BY_TAGS, _COARSEST_BY_INCH = 25.0, 10.0
_INCH = 2
_TIFF_UNITS = {_INCH: 25_400.0, 3: 10_000.0}  # micrometers


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


def plain_text(text: str, but: str) -> str:
    """Printable ASCII, in which everything else, and the characters of ``but``, became question marks."""
    return "".join(c if c.isascii() and c.isprintable() and c not in but else "?" for c in text)


def of_openslide(slide: Any, icc_profile: bytes | None = None) -> Metadata:
    """The metadata of an open ``openslide.OpenSlide``; of the profile as the file has it, where that is known."""
    properties = slide.properties
    return Metadata(
        mpp=_plausible(*(_positive(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")),
        objective=_positive(properties.get("openslide.objective-power")),
        background=_rgba(properties.get("openslide.background-color")),
        icc_profile=icc_profile or _icc_profile(slide),
    )


def of_tiff(file: Any, page: Any, is_transposed: bool) -> Metadata:
    """The metadata of an open ``tifffile.TiffFile``, and of the page of its scan, which may be shown transposed."""
    mpp: list[float | None] = [None, None]
    objective = None
    if file.is_ome:
        mpp, objective = _ome_metadata(file.ome_metadata)
    elif page.is_svs:
        details = dict(part.split("=", 1) for part in page.description.split("|")[1:] if "=" in part)
        entries = {key.strip(): _positive(value) for key, value in details.items()}
        mpp, objective = [entries.get("MPP")] * 2, entries.get("AppMag")
    if None in mpp:
        mpp = _tiff_resolution(file, page)
    return Metadata(
        mpp=_plausible(*(reversed(mpp) if is_transposed else mpp)),
        objective=objective,
        background=(255, 255, 255, 255),
        icc_profile=page.iccprofile,
    )


def _plausible(x: float | None, y: float | None) -> tuple[float, float] | None:
    if x is None or y is None or not all(_MPP[0] <= value <= _MPP[1] for value in (x, y)):
        return None
    return x, y


def _tiff_resolution(file: Any, page: Any) -> list[float | None]:
    """Micrometers a pixel, in x and y, by the tags of a TIFF."""
    number = page.tags.valueof("ResolutionUnit", _INCH)
    unit = _TIFF_UNITS.get(number) if isinstance(number, int) else None
    coarsest = _COARSEST_BY_INCH if number == _INCH else _COARSEST_BY_TAGS
    if file.is_imagej:
        coarsest = _COARSEST_BY_TAGS
        unit = _MICROMETERS.get(str((file.imagej_metadata or {}).get("unit")))
    mpp: list[float | None] = []
    for axis in "XY":
        match page.tags.valueof(f"{axis}Resolution"):
            case (int(count), int(per)) if unit and count and per and per / count * unit <= coarsest:
                mpp.append(per / count * unit)
            case _:
                mpp.append(None)
    return mpp


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
