"""Slides as files: tiled pyramidal BigTIFF, in the layout of Aperio or as OME-TIFF."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from stainnorm_transform import __version__
from stainnorm_transform.color import TABLE_SIZE, shift_table
from stainnorm_transform.resources import one_torch_thread
from stainnorm_transform.slides.metadata import OME, plain_text
from stainnorm_transform.slides.pyramid import TILE, Pyramid, Recolor, encoder, subsampling
from stainnorm_transform.slides.reader import Slide
from stainnorm_transform.slides.tables import look_up_pixels, shift_pixels
from stainnorm_transform.transform import NormalizeStain

_CENTIMETER = 1e4  # in micrometers
# Readers tell these images by this number.
_SUBFILE_TYPES = {"thumbnail": 0, "label": 1, "macro": 9}


@dataclass(frozen=True)
class SlideFormat:
    """How normalized slides are written.

    Args:
        quality: of JPEG, 1 to 100, whose color is subsampled 4:2:2, below 90 4:2:0; None is without loss, by Deflate.
        ome: OME-TIFF, rather than TIFF in the layout of Aperio, which OpenSlide reads with all levels and metadata.
        keep_label: whether to keep the images of the label and of the whole glass (macro), which shows the label.
        icc: an ICC profile that shows the slide normalized, rather than a slide.

    Raises:
        ValueError: there is no such quality.
    """

    quality: int | None = 90
    ome: bool = False
    keep_label: bool = False
    icc: bool = False

    def __post_init__(self) -> None:
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"expected a JPEG quality from 1 to 100, got {self.quality}")

    @property
    def suffix(self) -> str:
        """What names of such files end in."""
        if self.icc:
            return ".icc"
        return ".ome.tif" if self.ome else ".tif"


def write_slide(
    slide: Slide,
    path: Path,
    normalize: NormalizeStain | None,
    file_format: SlideFormat,
    threads: int,
    progress: Callable[[int], object] = lambda pixels: None,
) -> None:
    """Writes a slide in the colors of the target, in levels of half the size each, down to a single tile.

    Resolution, magnification and ICC profile are kept. Whatever else scanner or lab wrote may tell who the patient is,
    and is left out.

    Args:
        slide: an open slide.
        path: a new file, whatever its suffix; smaller levels wait in temporary files beside it.
        normalize: the transform of ``slide_normalizer``; None leaves the colors as they are.
        file_format: layout and compression.
        threads: to read, shift and encode with.
        progress: is told how many pixels of the slide have been done since the last time.

    Raises:
        ValueError: the slide is damaged.
        OSError: the file cannot be written.
    """
    import tifffile

    made = _provenance(normalize)
    # Before, as a table is made by all torch threads.
    recolor = _recolor(slide, normalize)
    with (
        one_torch_thread(),
        contextlib.closing(Pyramid(slide, recolor, encoder(file_format.quality), path.parent)) as pyramid,
        contextlib.closing(pyramid.largest(threads, progress)) as largest,
        tifffile.TiffWriter(path, bigtiff=True, ome=file_format.ome, shaped=False) as file,
    ):
        write = _write_ome if file_format.ome else _write_aperio
        write(file, slide, pyramid, [largest, *(level.tiles() for level in pyramid.smaller)], file_format, made)
    if file_format.ome and slide.objective:
        tifffile.tiffcomment(path, _with_objective(str(tifffile.tiffcomment(path)), slide.objective))


def _recolor(slide: Slide, normalize: NormalizeStain | None) -> Recolor | None:
    if normalize is None or normalize.fixed_map is None or not normalize.fixed_map.any():
        return None
    shift = -normalize.fixed_map.cpu()
    # A table costs as much as to shift so many pixels.
    if math.prod(slide.dimensions) < TABLE_SIZE:
        return functools.partial(shift_pixels, shift=shift, preserve_white=normalize.preserve_white)
    return functools.partial(look_up_pixels, table=shift_table(shift, normalize.preserve_white).numpy())


def _write_aperio(
    file: Any,
    slide: Slide,
    pyramid: Pyramid,
    levels: list[Iterator[bytes]],
    file_format: SlideFormat,
    made: dict[str, str],
) -> None:
    width, height = slide.dimensions
    size = f"{width}x{height} ({TILE}x{TILE})"
    entries = dict(made)
    if slide.mpp:
        entries = {"MPP": f"{math.sqrt(slide.mpp[0] * slide.mpp[1]):.6g}", **entries}
    if slide.objective:
        entries = {"AppMag": f"{slide.objective:g}", **entries}
    details = "".join(f"|{key} = {value}" for key, value in entries.items())

    def write_image(name: str, image: Image.Image) -> None:
        # OpenSlide takes the name from the second line; a thumbnail is told by its place.
        label = "" if name == "thumbnail" else f"{name} "
        text = f"Aperio Image Library\n{label}{image.width}x{image.height}"
        _write_image(file, name, image, description=text, metadata=None)

    for number, tiles in enumerate(levels):
        scaled = f" -> {pyramid.sizes[number][0]}x{pyramid.sizes[number][1]}" if number else ""
        text = f"Aperio Image Library layout, stainnorm {__version__}\n{size}{scaled}{details}"
        options = _level_options(slide, pyramid, number, file_format)
        file.write(tiles, description=text, metadata=None, subfiletype=0, **options)
        if number == 0:
            write_image("thumbnail", pyramid.thumbnail())
    for name, image in _label_images(slide, file_format).items():
        write_image(name, image)


def _write_ome(
    file: Any,
    slide: Slide,
    pyramid: Pyramid,
    levels: list[Iterator[bytes]],
    file_format: SlideFormat,
    made: dict[str, str],
) -> None:
    description = ", ".join(f"{key} = {value}" for key, value in made.items())
    metadata: dict[str, Any] = {"axes": "YXS", "Name": "slide", "Description": description}
    if slide.mpp:
        for axis, mpp in zip("XY", slide.mpp, strict=True):
            metadata |= {f"PhysicalSize{axis}": mpp, f"PhysicalSize{axis}Unit": "µm"}
    for number, tiles in enumerate(levels):
        options = _level_options(slide, pyramid, number, file_format)
        if number == 0:
            file.write(tiles, metadata=metadata, subifds=len(levels) - 1, **options)
        else:
            file.write(tiles, metadata=None, subfiletype=1, **options)
    for name, image in {"thumbnail": pyramid.thumbnail(), **_label_images(slide, file_format)}.items():
        _write_image(file, name, image, metadata={"Name": name})


def _level_options(slide: Slide, pyramid: Pyramid, level: int, file_format: SlideFormat) -> dict[str, Any]:
    width, height = pyramid.sizes[level]
    options: dict[str, Any] = {
        "shape": (height, width, 3),
        "dtype": np.uint8,
        "tile": (TILE, TILE),
        "photometric": "rgb",
        "iccprofile": slide.icc_profile,
        "software": f"stainnorm {__version__}",
    }
    if file_format.quality is None:
        options |= {"compression": "zlib", "predictor": True}
    else:
        options |= {"compression": "jpeg", "subsampling": subsampling(file_format.quality)}
    if slide.mpp:
        x, y = (_CENTIMETER / mpp / 2**level for mpp in slide.mpp)
        options |= {"resolution": (x, y), "resolutionunit": "CENTIMETER"}
    return options


def _write_image(file: Any, name: str, image: Image.Image, **options: Any) -> None:
    file.write(
        np.asarray(image),
        photometric="rgb",
        compression="zlib",
        predictor=True,
        rowsperstrip=image.height,
        subfiletype=_SUBFILE_TYPES[name],
        **options,
    )


def _label_images(slide: Slide, file_format: SlideFormat) -> dict[str, Image.Image]:
    if not file_format.keep_label:
        return {}
    found = slide.associated_images()
    return {name: found[name] for name in ("label", "macro") if name in found}


def _provenance(normalize: NormalizeStain | None) -> dict[str, str]:
    """What was done to the colors, for the description."""
    if normalize is None or normalize.fixed_map is None:
        return {}
    target = plain_text(normalize.target, but="|=;")
    a, b = (" ".join(f"{value:.4f}" for value in row) for row in normalize.fixed_map.tolist())
    return {"Stain target": target, "Stain map a": a, "Stain map b": b}


def _with_objective(xml: str, magnification: float) -> bytes:
    """OME-XML with the objective of the first image, for which tifffile has no word."""
    ElementTree.register_namespace("", OME)
    root = ElementTree.fromstring(xml)
    image = root.find(f"{{{OME}}}Image")
    pixels = root.find(f"{{{OME}}}Image/{{{OME}}}Pixels")
    if image is None or pixels is None:
        raise ValueError("expected OME-XML with an image")
    instrument = ElementTree.Element(f"{{{OME}}}Instrument", ID="Instrument:0")
    objective = {"ID": "Objective:0", "NominalMagnification": f"{magnification:g}"}
    ElementTree.SubElement(instrument, f"{{{OME}}}Objective", objective)
    root.insert(list(root).index(image), instrument)
    # In the order of the schema.
    where = list(image).index(pixels)
    image.insert(where, ElementTree.Element(f"{{{OME}}}ObjectiveSettings", ID="Objective:0"))
    image.insert(where, ElementTree.Element(f"{{{OME}}}InstrumentRef", ID="Instrument:0"))
    return ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True)
