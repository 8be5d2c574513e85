"""Which files are slides, and what opens them.

OpenSlide does, and tiffslide those that are OME-TIFF: ``pip install ".[slides]"`` in a clone.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from stainnorm_transform.files import check_regular, one_line

# Of formats that hold nothing but slides. A TIFF may be either.
SUFFIXES = (".svs", ".ndpi", ".mrxs", ".vms", ".vmu", ".scn", ".bif", ".svslide", ".czi", ".dcm")
# A tiled TIFF of one page is a slide from this many pixels on.
SLIDE_PIXELS = 1 << 26
# OpenSlide ends the process where memory for a tile is missing; no scanner writes larger ones.
_TILE_PIXELS = 1 << 26
# Bytes of decoded tiles that OpenSlide keeps: enough for those that neighboring blocks share.
_CACHE = 8 << 20


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
            with contextlib.suppress(ImportError, ValueError, OSError), open_reader(path)[0] as slide:
                # The files of one slide agree in it.
                series = path.parent, str(slide.properties.get("dicom.SeriesInstanceUID"))
                if series in seen:
                    parts.add(path)
                seen.add(series)
    return [path for path in paths if path not in parts]


class Tiff(NamedTuple):
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
        raise ImportError(
            f'slides need more packages: in a clone of the repository, run pip install ".[slides]" ({error})'
        ) from error
    return openslide, tifffile, tiffslide


def open_reader(path: Path) -> tuple[Any, Tiff]:
    """OpenSlide's or tiffslide's slide, open, and what its TIFF says besides.

    Raises:
        ImportError: OpenSlide, tiffslide or imagecodecs is not installed.
        ValueError: it is no slide, damaged, or not 8-bit RGB.
        OSError: there is no such file, or it may not be read.
    """
    check_regular(path)
    if not path.stat().st_size:
        raise ValueError("an empty file")
    openslide, tifffile, tiffslide = packages()
    tiff = Tiff()
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
        raise ValueError(f"damaged slide ({one_line(error)})") from error


def _check_tiff(tifffile: Any, path: Path) -> Tiff:
    """Raises ValueError for a TIFF that is not 8-bit RGB."""
    try:
        with _silent(tifffile.logger()):
            file = tifffile.TiffFile(path)
    except tifffile.TiffFileError:
        return Tiff()
    with file, _silent(tifffile.logger()):
        try:
            pages = [page.aspage() for page in file.pages]
        except Exception as error:
            raise ValueError(f"a damaged or truncated TIFF ({one_line(error)})") from error
        if not pages:
            raise ValueError("a damaged or truncated TIFF, in which no image is found")
        for page in pages:
            if page.is_tiled and page.tilewidth * page.tilelength > _TILE_PIXELS:
                size = f"{page.tilewidth} x {page.tilelength}"
                raise ValueError(f"expected tiles of at most {_TILE_PIXELS} pixels, got {size}")
        page = max(pages, key=lambda page: page.imagelength * page.imagewidth)
        channels, bits = page.samplesperpixel, page.bitspersample
        if channels not in (3, 4) or bits != 8:
            raise ValueError(f"expected 8-bit RGB, got {bits} bits and {channels} channel{'s' * (channels > 1)} a page")
        if page.photometric not in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR):
            raise ValueError(f"expected RGB, got color model {page.photometric.name}")
        tiled = sum(page.is_tiled for page in pages)
        if not file.is_ome:
            return Tiff(tiled, None, page.iccprofile)
        if page.planarconfig != tifffile.PLANARCONFIG.CONTIG:
            raise ValueError("expected red, green and blue of a pixel side by side, got separate planes")
        if file.series[0].ndim != 3:
            raise ValueError(f"expected one plane of RGB (axes YXS), got axes {file.series[0].axes}")
        # Thumbnail, label and macro image are small, or in strips.
        others = [series.size for series in file.series[1:] if series.keyframe.is_tiled]
        if max(others, default=0) > file.series[0].size / 4:
            raise ValueError(f"expected one scan, and first, got {len(file.series)} images, others as large")
        return Tiff(tiled, file.ome_metadata, page.iccprofile)


@contextlib.contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """For messages of damage without the name of the file."""
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
