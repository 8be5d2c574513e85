"""Which files are slides, and what opens them.

OpenSlide does, if they are of a scanner's format, and else tifffile: ``pip install ".[slides]"`` in a clone.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from stainnorm_transform.files import check_regular, one_line, version
from stainnorm_transform.slides import dicom
from stainnorm_transform.slides.tiff import TiffReader
from stainnorm_transform.slides.tiff_scan import check_rgb, silent, the_scan
from stainnorm_transform.slides.tiff_tiles import CONVERT, check_image, check_tile
from stainnorm_transform.slides.vendor import OpenSlideReader

# Of formats that hold nothing but slides. A TIFF may be either.
SUFFIXES = (".svs", ".ndpi", ".mrxs", ".vms", ".vmu", ".scn", ".bif", ".svslide", ".czi", ".dcm")
TIFF_SUFFIXES = (".tif", ".tiff")
# Of slides that are not read, and whose they are.
UNREAD = {
    ".vsi": "Olympus",
    ".ets": "Olympus",
    ".isyntax": "Philips iSyntax",
    ".i2syntax": "Philips iSyntax",
    ".qptiff": "Akoya",
    ".kfb": "KFBIO",
    ".sdpc": "Sqray",
    ".mdsx": "Motic",
    ".mds": "Motic",
    ".tron": "InteMedic",
    ".tmap": "UNIC",
    ".afi": "Aperio fluorescence",
    ".lif": "Leica LIF",
    ".zvi": "Zeiss ZVI",
    ".nd2": "Nikon",
}
# What to convert them to.
ADVICE = "to OME-TIFF or DICOM, by QuPath, bfconvert or the scanner's own program"
# A scan, its levels and other images are far fewer.
_MOST_PAGES = 10_000
# A TIFF in strips is a slide from this many pixels on.
SLIDE_PIXELS = 1 << 26
Reader = OpenSlideReader | TiffReader


def is_slide(path: Path) -> bool:
    """Whether a file is to be read as a slide.

    It is by its suffix, by the mark of DICOM in it, or as a TIFF of a scanner, in tiles, with levels, with channels in
    pages of their own, or of many pixels.
    """
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return True
    if suffix not in TIFF_SUFFIXES:
        return suffix not in Image.registered_extensions() and dicom.is_dicom(path)
    try:
        check_regular(path)
        state = path.stat()
        return _is_slide_tiff(path, (state.st_dev, state.st_ino, *version(state)))
    except Exception:  # Reading it will say why.
        return False


# A run asks several times of each file.
@functools.lru_cache(maxsize=1 << 16)
def _is_slide_tiff(path: Path, identity: tuple[int, ...]) -> bool:
    try:
        openslide, tifffile = packages()
    except ImportError:  # Then it only matters whether these are missed.
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            tags = image.tag_v2  # type: ignore[attr-defined]
            return ExifTags.Base.TileWidth in tags or ExifTags.Base.SubIFDs in tags
    with silent(), tifffile.TiffFile(path) as file:
        if openslide.OpenSlide.detect_format(path) not in (None, "generic-tiff"):
            return True
        if any(page.is_tiled for page in _in_turn(file)) or any(len(series.levels) > 1 for series in file.series):
            return True
        scan = the_scan(file)
        return len(scan.pages) > 1 or scan.keyframe.imagewidth * scan.keyframe.imagelength >= SLIDE_PIXELS


def refuse_unread(path: Path) -> None:
    """Raises ValueError for slides of kinds that are not read."""
    if maker := UNREAD.get(path.suffix.lower()):
        raise ValueError(f"not supported: {maker} ({path.suffix.lower()}); convert it {ADVICE}")


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
        if dicom.is_dicom(path) and (series := dicom.series_of(path)):
            # The files of one slide agree in it.
            if (path.parent, series) in seen:
                parts.add(path)
            seen.add((path.parent, series))
    return [path for path in paths if path not in parts]


def packages() -> tuple[Any, Any]:
    """OpenSlide and tifffile.

    Raises:
        ImportError: they, imagecodecs or simplejpeg are not installed.
    """
    try:
        import imagecodecs  # noqa: F401
        import openslide
        import simplejpeg  # type: ignore[import-untyped]  # noqa: F401
        import tifffile
    except (ImportError, OSError) as error:
        raise ImportError(
            f'slides need more packages: in a clone of the repository, run pip install ".[slides]" ({error})'
        ) from error
    return openslide, tifffile


def open_reader(path: Path, skip_damaged: bool = False) -> Reader:
    """What reads a slide, open.

    Args:
        path: of the slide.
        skip_damaged: whether parts that cannot be decoded are left out instead of an error.

    Raises:
        ImportError: OpenSlide, tifffile or imagecodecs is not installed.
        ValueError: it is no slide, damaged, not supported, or not 8-bit RGB.
        OSError: there is no such file, or it may not be read.
    """
    refuse_unread(path)
    check_regular(path)
    if not path.stat().st_size:
        raise ValueError("an empty file")
    packages()
    try:
        return _open(path, skip_damaged)
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # tifffile lets errors of every kind through.
        if isinstance(error, OSError) and error.errno:
            raise
        if missing := _unsupported(error):
            raise ValueError(f"not supported: {missing}; convert it {ADVICE}") from error
        raise ValueError(f"damaged slide ({one_line(error)})") from error


def _open(path: Path, skip_damaged: bool) -> Reader:
    openslide, tifffile = packages()
    vendor = openslide.OpenSlide.detect_format(path)
    try:
        with silent():
            file = tifffile.TiffFile(path)
    except tifffile.TiffFileError:
        if vendor is None:
            raise ValueError("not a slide of a format that OpenSlide reads, nor TIFF") from None
        if vendor == "dicom":
            dicom.check_colors(path)
        return OpenSlideReader(path, None, skip_damaged)
    is_used = False
    try:
        with silent():
            pages = _pages(file)
            if vendor not in (None, "generic-tiff"):
                icc_profile = _check_vendor_tiff(pages)
                direct = file if vendor == "aperio" else None
                try:
                    reader = OpenSlideReader(path, icc_profile, skip_damaged, direct)
                    is_used = direct is not None
                    return reader
                except openslide.OpenSlideError as error:
                    # The tiles of this format lie side by side as in any TIFF.
                    if vendor != "aperio" or not _unsupported(error):
                        raise
            _check_end(file)
            tiff_reader = TiffReader(file, skip_damaged)
            is_used = True
            return tiff_reader
    finally:
        if not is_used:
            file.close()


def _pages(file: Any) -> list[Any]:
    """All pages of a TIFF, of which none may be damaged or have tiles that are too large."""
    try:
        pages = [page.aspage() for page in itertools.islice(_in_turn(file), _MOST_PAGES + 1)]
    except Exception as error:
        raise ValueError(f"a damaged or truncated TIFF ({one_line(error)})") from error
    if len(pages) > _MOST_PAGES:
        raise ValueError(f"not supported: a TIFF of more than {_MOST_PAGES} pages")
    for page in pages:
        check_image(page.imagewidth, page.imagelength)
    if not pages or not file.series:
        raise ValueError("a damaged or truncated TIFF, in which no image is found")
    for page in pages:
        if page.is_tiled:
            check_tile(page.tilewidth, page.tilelength)
    return pages


def _in_turn(file: Any) -> Iterator[Any]:
    """The pages of a TIFF, each read when it is asked for.

    Raises:
        ValueError: one names an earlier one as the next, where tifffile would go round for ever.
    """
    seen: set[int] = set()
    for page in file.pages:
        if page.offset in seen:
            raise ValueError("its pages form a circle")
        seen.add(page.offset)
        yield page


def _check_end(file: Any) -> None:
    """Raises ValueError where the last page names one more, which tifffile passes over: the file was cut."""
    file.filehandle.seek(file.pages.next_page_offset)
    next_page = file.filehandle.read(file.tiff.offsetsize)
    if next_page.strip(b"\0"):
        raise ValueError("a damaged or truncated TIFF (pages are missing)")


def _check_vendor_tiff(pages: list[Any]) -> bytes | None:
    """Raises ValueError for a TIFF that OpenSlide would read wrongly; the ICC profile of the largest image."""
    largest = max(pages, key=lambda page: page.imagelength * page.imagewidth)
    check_rgb(largest, largest.samplesperpixel)
    if (orientation := largest.tags.valueof("Orientation", 1)) != 1:
        raise ValueError(f"not supported: Orientation {orientation} in a scanner's format; {CONVERT}")
    profile: bytes | None = largest.iccprofile
    return profile


def _unsupported(error: Exception) -> str:
    """What OpenSlide does not support, if it says so: "JPEG XR compression", or "Unsupported TIFF compression: 1"."""
    text = one_line(error)
    if text.startswith("Unsupported "):
        return text.removeprefix("Unsupported ")
    return text.removesuffix(" is not supported") if text.endswith(" is not supported") else ""
