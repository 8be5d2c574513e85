"""Whole slides: which files are slides, and reading them.

OpenSlide reads them, and tiffslide those that are OME-TIFF: ``pip install "stainnorm-transform[slides]"``.
"""

from __future__ import annotations

import collections
import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms
from torch import Tensor

from stainnorm_transform.color import TABLE_SIZE
from stainnorm_transform.files import check_regular
from stainnorm_transform.threads import in_order

Pixels = NDArray[np.uint8]
# Of formats that hold nothing but slides. A TIFF may be either.
SUFFIXES = (".svs", ".ndpi", ".mrxs", ".vms", ".vmu", ".scn", ".bif", ".svslide", ".czi", ".dcm")
# A tiled TIFF of one page is a slide from this many pixels on.
SLIDE_PIXELS = 1 << 26
OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_READ_SIDE = 1024
_MICROMETERS = {"nm": 1e-3, "µm": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}
_STRIP_PIXELS = 1 << 16
# Bytes of decoded tiles that OpenSlide keeps: enough for those that neighboring blocks share.
_CACHE = 8 << 20
# What is outside is no resolution of a slide.
_MPP = (0.01, 1000.0)


class Slide:
    """A whole slide: Aperio, Hamamatsu, MIRAX, Philips, tiled TIFF, OME-TIFF, DICOM and what else OpenSlide reads.

    Reading is safe in threads. After a fork, open it again.

    Args:
        path: of the slide; of a slide of several files, the one that OpenSlide opens.
        to_srgb: whether colors are converted to sRGB by the slide's ICC profile, if it has one. Otherwise they are as
            stored, which nearly all models were trained on.

    Attributes:
        dimensions: (width, height) in pixels, of level 0.
        level_dimensions: the same of each level.
        level_downsamples: how many pixels of level 0 one of each level stands for, a side.
        mpp: (x, y) micrometers a pixel, or None where the slide does not say.
        objective: magnification of the objective, or None.
        icc_profile: of the colors that are read, or None.
        series: what the files of one DICOM slide have in common, or "None".

    Raises:
        ImportError: OpenSlide, tiffslide or imagecodecs is not installed.
        ValueError: it is no slide, damaged, or not 8-bit RGB.
        OSError: there is no such file, or it may not be read.
    """

    def __init__(self, path: str | os.PathLike[str], to_srgb: bool = False) -> None:
        self.path = Path(path)
        self._reader, tiff = _open(self.path)
        try:
            self._describe(tiff, to_srgb)
        except Exception as error:
            self.close()
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"damaged slide ({_what(error)})") from error

    def _describe(self, tiff: _Tiff, to_srgb: bool) -> None:
        properties = self._reader.properties
        self._is_ome = tiff.ome is not None
        self.level_dimensions: list[tuple[int, int]] = [tuple(size) for size in self._reader.level_dimensions]
        self.level_downsamples: list[float] = [float(value) for value in self._reader.level_downsamples]
        self.dimensions = self.level_dimensions[0]
        if tiff.ome is None:
            mpp = [_positive(properties.get(f"openslide.mpp-{axis}")) for axis in "xy"]
            self.objective = _positive(properties.get("openslide.objective-power"))
        else:
            mpp, self.objective = _ome_metadata(tiff.ome)
        mpp = [value if value is not None and _MPP[0] <= value <= _MPP[1] else None for value in mpp]
        self.mpp = None if mpp[0] is None or mpp[1] is None else (mpp[0], mpp[1])
        # The files of one DICOM slide agree in it.
        self.series = str(properties.get("dicom.SeriesInstanceUID"))
        self._background = _rgba(properties.get("openslide.background-color"))
        self.icc_profile = tiff.icc_profile or _icc_profile(self._reader)
        self._colors: NDArray[np.int32] | None = None
        if to_srgb and self.icc_profile:
            self._colors = _srgb_table(self.icc_profile)
            self.icc_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._reader.close()

    def read(self, x: int, y: int, width: int, height: int, level: int = 0) -> Tensor:
        """A region as uint8 (3, height, width); what was not scanned has the slide's background color, or white.

        Args:
            x: of its left edge, in pixels of level 0.
            y: of its upper edge, in pixels of level 0.
            width: in pixels of ``level``.
            height: in pixels of ``level``.
            level: 0 is the largest.

        Raises:
            ValueError: there is no such level, or the slide is damaged here.
        """
        return torch.from_numpy(self.pixels(x, y, width, height, level)[..., :3].copy()).permute(2, 0, 1)

    def pixels(self, x: int, y: int, width: int, height: int, level: int = 0) -> Pixels:
        """As ``read``, as it lies in memory, read-only: (height, width, 4), of which the last channel means nothing."""
        if not 0 <= level < len(self.level_dimensions):
            raise ValueError(f"expected a level from 0 to {len(self.level_dimensions) - 1}, got {level}")
        if width < 1 or height < 1:
            raise ValueError(f"expected a region of 1 x 1 pixels or more, got {width} x {height}")
        try:
            region = self._region(x, y, width, height, level)
        except Exception as error:
            raise ValueError(f"damaged at x = {x}, y = {y} of {width} x {height} pixels: {_what(error)}") from error
        pixels = np.asarray(region)
        if pixels[..., 3].min() < 255:
            pixels = np.asarray(Image.alpha_composite(Image.new("RGBA", region.size, self._background), region))
        return pixels if self._colors is None else look_up_pixels(pixels, self._colors)

    def _region(self, x: int, y: int, width: int, height: int, level: int) -> Image.Image:
        """A region of mode RGBA, transparent where it is outside of what was scanned."""
        if not self._is_ome:
            return self._reader.read_region((x, y), level, (width, height))
        scale = self.level_downsamples[level]
        left, top = round(x / scale), round(y / scale)
        columns, rows = self.level_dimensions[level]
        right, bottom = min(left + width, columns), min(top + height, rows)
        region = Image.new("RGBA", (width, height))
        inside = max(0, left), max(0, top)
        if inside[0] < right and inside[1] < bottom:
            # tiffslide rounds down when it goes back to the level.
            start = math.ceil(inside[0] * scale), math.ceil(inside[1] * scale)
            size = right - inside[0], bottom - inside[1]
            part = self._reader.read_region(start, level, size).convert("RGBA")
            region.paste(part, (inside[0] - left, inside[1] - top))
        return region

    def associated_images(self) -> dict[str, Image.Image]:
        """The images of mode RGB beside the scan, by name: of the label, of the whole glass (macro), a thumbnail.

        Raises:
            ValueError: one is damaged.
        """
        try:
            return {name: image.convert("RGB") for name, image in self._reader.associated_images.items()}
        except Exception as error:
            raise ValueError(f"damaged label, macro or thumbnail image: {_what(error)}") from error

    def thumbnail(self, side: int) -> Image.Image:
        """The whole slide with ``side`` pixels on its longer side at most, by its smallest level that has as many."""
        downsample = max(1.0, max(self.dimensions) / side)
        image, _ = self.reduced(downsample, threads=1)
        small = Image.fromarray(image[..., :3])
        small.thumbnail((side, side))
        return small

    def level_for(self, downsample: float) -> int:
        """The smallest level that has as many pixels as level 0 has after downsampling."""
        # Downsamples are ratios of rounded sizes.
        fitting = [i for i, value in enumerate(self.level_downsamples) if value <= downsample * 1.01]
        return max(fitting, key=lambda i: self.level_downsamples[i], default=0)

    def reduced(self, downsample: float, threads: int) -> tuple[Pixels, float]:
        """The whole slide (H, W, 4), smaller by about ``downsample``, piece by piece; and by how much it is."""
        level = self.level_for(downsample)
        width, height = self.level_dimensions[level]
        scale = self.level_downsamples[level]
        step = max(1, int(downsample / scale * 1.01))
        side = max(step, _READ_SIDE // step * step)
        out = np.empty((-(-height // step), -(-width // step), 4), np.uint8)

        def read(corner: tuple[int, int]) -> None:
            left, top = corner
            size = min(side, width - left), min(side, height - top)
            piece = Image.fromarray(self.pixels(round(left * scale), round(top * scale), *size, level))
            small = np.asarray(piece.reduce(step))
            out[top // step :, left // step :][: small.shape[0], : small.shape[1]] = small

        collections.deque(in_order(read, corners(width, height, side), threads), maxlen=0)
        return out, scale * step


def is_slide(path: Path) -> bool:
    """Whether a file is to be read as a slide: by its suffix, or a tiled TIFF of several pages or of many pixels."""
    suffix = path.suffix.lower()
    if suffix not in (".tif", ".tiff"):
        return suffix in SUFFIXES
    try:
        check_regular(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                tags = image.tag_v2  # type: ignore[attr-defined]
                if ExifTags.Base.TileWidth not in tags:
                    return False
                has_levels = ExifTags.Base.SubIFDs in tags or getattr(image, "n_frames", 1) > 1
                return has_levels or image.width * image.height >= SLIDE_PIXELS
    except Image.DecompressionBombError:
        return True
    except Exception:  # Reading it will say why.
        return False


def without_parts(paths: Iterable[Path]) -> list[Path]:
    """Leaves out files that are parts of others: JPEGs of Hamamatsu VMS, and all but one DICOM file of a slide."""
    paths = list(paths)
    parts: set[Path] = set()
    for path in paths:
        if path.suffix.lower() in (".vms", ".vmu"):
            with contextlib.suppress(OSError, ValueError):
                check_regular(path)
                with path.open(errors="replace") as file:
                    lines = file.read(1 << 20).splitlines()
                parts |= {path.parent / line.partition("=")[2].strip() for line in lines}
    seen: set[tuple[Path, str]] = set()
    for path in paths:
        if path.suffix.lower() == ".dcm":
            with contextlib.suppress(ImportError, ValueError, OSError), Slide(path) as slide:
                series = path.parent, slide.series
                if series in seen:
                    parts.add(path)
                seen.add(series)
    return [path for path in paths if path not in parts]


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


def corners(width: int, height: int, side: int) -> Iterator[tuple[int, int]]:
    """(x, y) of the tiles of an image, row by row."""
    return ((x, y) for y in range(0, height, side) for x in range(0, width, side))


class _Tiff(NamedTuple):
    """What is looked up in a TIFF file besides: its layout, its OME-XML, and the ICC profile as it is stored."""

    tiled_pages: int | None = None
    ome: str | None = None
    icc_profile: bytes | None = None


def packages() -> tuple[Any, Any, Any]:
    """OpenSlide, tifffile and tiffslide.

    Raises:
        ImportError: they, or imagecodecs, are not installed.
    """
    try:
        import imagecodecs  # noqa: F401
        import openslide
        import tifffile
        import tiffslide
    except (ImportError, OSError) as error:
        raise ImportError(f'slides take more packages: pip install "stainnorm-transform[slides]" ({error})') from error
    return openslide, tifffile, tiffslide


def _open(path: Path) -> tuple[Any, _Tiff]:
    """The reader of a slide."""
    check_regular(path)
    if not path.stat().st_size:
        raise ValueError("an empty file")
    openslide, tifffile, tiffslide = packages()
    tiff = _Tiff()
    try:
        tiff = _check_tiff(tifffile, path)
        if tiff.ome is not None:
            return tiffslide.TiffSlide(path), tiff
        slide = openslide.OpenSlide(path)
        slide.set_cache(openslide.OpenSlideCache(_CACHE))
        if slide.properties["openslide.vendor"] == "generic-tiff" and (tiff.tiled_pages or 0) > slide.level_count:
            slide.close()
            raise ValueError(f"{tiff.tiled_pages} pages, of which only one would be kept: split it first")
        return slide, tiff
    except openslide.OpenSlideUnsupportedFormatError as error:
        if tiff.tiled_pages is None:
            raise ValueError("not a slide of a format that OpenSlide reads, nor OME-TIFF") from error
        raise ValueError("a damaged or truncated TIFF" if tiff.tiled_pages else "a TIFF that is not tiled") from error
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # tifffile and tiffslide let errors of every kind through.
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"damaged slide ({_what(error)})") from error


def _check_tiff(tifffile: Any, path: Path) -> _Tiff:
    """Raises ValueError for a TIFF that is not 8-bit RGB."""
    try:
        with _silent(tifffile.logger()):
            file = tifffile.TiffFile(path)
    except tifffile.TiffFileError:
        return _Tiff()
    with file, _silent(tifffile.logger()):
        try:
            pages = [page.aspage() for page in file.pages]
        except Exception as error:
            raise ValueError(f"a damaged or truncated TIFF ({_what(error)})") from error
        if not pages:
            raise ValueError("a damaged or truncated TIFF, in which no image is found")
        page = max(pages, key=lambda page: page.imagelength * page.imagewidth)
        channels, bits = page.samplesperpixel, page.bitspersample
        if channels not in (3, 4) or bits != 8:
            raise ValueError(f"expected 8-bit RGB, got {bits} bits and {channels} channel{'s' * (channels > 1)} a page")
        if page.photometric not in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR):
            raise ValueError(f"expected RGB, got color model {page.photometric.name}")
        tiled = sum(page.is_tiled for page in pages)
        if not file.is_ome:
            return _Tiff(tiled, None, page.iccprofile)
        if page.planarconfig != tifffile.PLANARCONFIG.CONTIG:
            raise ValueError("expected red, green and blue of a pixel side by side, got separate planes")
        if file.series[0].ndim != 3:
            raise ValueError(f"expected one plane of RGB (axes YXS), got axes {file.series[0].axes}")
        # Thumbnail, label and macro image are small, or in strips.
        others = [series.size for series in file.series[1:] if series.keyframe.is_tiled]
        if max(others, default=0) > file.series[0].size / 4:
            raise ValueError(f"expected one scan, and first, got {len(file.series)} images, others as large")
        return _Tiff(tiled, file.ome_metadata, page.iccprofile)


@contextlib.contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """For messages of damage without the name of the file."""
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _what(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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


def _srgb_table(icc_profile: bytes) -> NDArray[np.int32]:
    """What every uint8 color is in sRGB, as ``color.shift_table``."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        convert = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), "RGB", "RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise ValueError(f"its ICC profile cannot be used: {_what(error)}") from error
    table = np.arange(TABLE_SIZE, dtype="<i4").view(np.uint8).reshape(256, 256, 256, 4)
    for colors in table:
        converted = ImageCms.applyTransform(Image.fromarray(np.ascontiguousarray(colors[..., :3])), convert)
        colors[..., :3] = np.asarray(converted)
    return table.view("<i4").reshape(-1)
