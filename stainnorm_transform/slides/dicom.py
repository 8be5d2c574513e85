"""DICOM files: told by their content, and what OpenSlide does not look at."""

from __future__ import annotations

import contextlib
from pathlib import Path

from stainnorm_transform.files import check_regular

_MARK = 128, b"DICM"
# PhotometricInterpretation and PixelData, in explicit little endian, as in all files with compressed frames.
_COLOR_MODEL = b"\x28\x00\x04\x00CS"
_PIXEL_DATA = b"\xe0\x7f\x10\x00OB\x00\x00\xff\xff\xff\xff"
# Within so many bytes lie the header, and that of the first frame after the table of frames.
_HEADER = 1 << 24
_JFIF = b"\xff\xd8\xff\xe0"


def is_dicom(path: Path) -> bool:
    """Whether a file has the mark of DICOM, and is no list of others."""
    place, mark = _MARK
    try:
        check_regular(path)
        with path.open("rb") as file:
            file.seek(place)
            return file.read(len(mark)) == mark and path.stem != "DICOMDIR"
    except (OSError, ValueError):
        return False


def series_of(path: Path) -> str | None:
    """What the files of one slide agree in, or None for what OpenSlide does not open."""
    with contextlib.suppress(Exception):
        import openslide

        with openslide.OpenSlide(path) as slide:
            return slide.properties.get("dicom.SeriesInstanceUID")
    return None


def check_colors(path: Path) -> None:
    """Raises ValueError where the header says RGB and the JPEG data YCbCr: OpenSlide would show false colors."""
    with path.open("rb") as file:
        header = file.read(_HEADER)
    model, data = header.find(_COLOR_MODEL), header.find(_PIXEL_DATA)
    if not 0 <= model < data:
        return
    length = int.from_bytes(header[model + 6 : model + 8], "little")
    if header[model + 8 : model + 8 + length].strip(b" \0") != b"RGB":
        return
    frame = header.find(b"\xff\xd8\xff", data)
    # JFIF is YCbCr by definition.
    if frame >= 0 and header.startswith(_JFIF, frame) and header[frame + 6 : frame + 10] == b"JFIF":
        raise ValueError(
            "not supported: its header says RGB, but its JPEG data is YCbCr, so that colors would be false; mend the "
            'headers of all its files, for example by: dcmodify -m "(0028,0004)=YBR_FULL_422" *.dcm'
        )
