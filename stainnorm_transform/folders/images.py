"""Image files: reading and writing them."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from stainnorm_transform.files import check_regular

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".jp2", ".j2k")
# A label mask has at most this many colors, at least this many pixels for each, and this share of neighbors is alike.
MASK_COLORS, MASK_PIXELS, MASK_ALIKE = 64, 100, 0.8
_JPEG: dict[str, Any] = {"quality": 95, "subsampling": 0}
_TIFF: dict[str, Any] = {"compression": "tiff_adobe_deflate"}
# How each format is written. Tissue as PNG is hardly smaller at higher levels, which take twice as long. WebP with loss
# halves the resolution of color; ``exact`` keeps the colors of what is transparent.
_HOW: dict[str, dict[str, Any]] = {
    ".png": {"compress_level": 3},
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".webp": {"lossless": True, "exact": True},
    ".jp2": {"mct": 1},
    ".j2k": {"mct": 1, "no_jp2": True},
}
# In JPEG 2000 the size of the image and the bits of its channels follow these bytes.
_CODESTREAM = b"\xff\x4f\xff\x51"


def read(path: Path) -> Image.Image:
    """Reads an image file of mode RGB or RGBA, with palettes resolved, or a label mask as it is: see ``is_mask``.

    Raises:
        ValueError: it is grey, has more than 8 bits a channel, more than one page, another color model or suffix, or
            more pixels than Pillow takes for safe.
        OSError: it is no image, or not a whole one.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"expected a file ending in {', '.join(SUFFIXES)}")
    check_regular(path)
    try:
        with warnings.catch_warnings():
            # Of metadata that is not used, or of a size below the limit.
            warnings.simplefilter("ignore")
            return _read(path)
    except (ValueError, MemoryError, UnidentifiedImageError):
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, the limit against decompression bombs: convert "
            "it to a tiled TIFF, which is read piece by piece, as libvips does by: vips tiffsave IN OUT.tif --tile "
            "--pyramid --bigtiff --compression deflate"
        ) from error
    except Exception as error:  # Pillow's decoders let errors of every kind through.
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"damaged image ({type(error).__name__}: {error})") from error


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        if _bits(image, path) > 8:  # Pillow would drop the lower bits in silence.
            raise ValueError("16 bits a channel: convert it to 8 bits first")
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError("more than one page, of which only the first would be kept: split it first")
        if isinstance(image, TiffImageFile):
            _turn_resolution(image)
        image.load()
        if is_mask(image):
            return image
        if image.mode in ("1", "L", "LA", "I", "F"):
            raise ValueError(f"a grey image (mode {image.mode}) has no stain color")
        if image.mode == "P" or "transparency" in image.info:
            resolved = image.convert("RGBA" if "transparency" in image.info else "RGB")
            if isinstance(image, TiffImageFile):
                resolved.tag_v2 = image.tag_v2  # type: ignore[attr-defined]
            resolved.info = {key: value for key, value in image.info.items() if key != "transparency"}
            return resolved
        if image.mode not in ("RGB", "RGBA"):
            raise ValueError(f"color model {image.mode}: convert it to RGB first")
        return image


def _bits(image: Image.Image, path: Path) -> int:
    """Bits a channel of an image file that is open but not loaded."""
    if isinstance(image, TiffImageFile):
        return int(max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (8,))))
    if image.format == "JPEG2000":
        with path.open("rb") as file:
            size = file.read(1 << 20).partition(_CODESTREAM)[2]
        return (size[38] & 0x7F) + 1 if len(size) > 38 else 8
    # BMP of 16 bits a pixel has 5 or 6 a channel.
    modes = str(image.tile)  # type: ignore[attr-defined]
    return 16 if ";16" in modes and "BGR;16" not in modes else 8


def _turn_resolution(image: TiffImageFile) -> None:
    """As Pillow turns the pixels of a TIFF, by its Orientation, when it loads them."""
    tags = ExifTags.Base
    stored = image.tag_v2
    if stored.get(tags.Orientation) in (5, 6, 7, 8) and tags.XResolution in stored and tags.YResolution in stored:
        x, y = stored[tags.XResolution], stored[tags.YResolution]
        stored[tags.XResolution], stored[tags.YResolution] = y, x


def is_mask(image: Image.Image) -> bool:
    """Whether an image is a label mask, or blank: of few flat colors, which stand for classes and not for stain.

    These are at most 64, and one for every 100 pixels; and 4 of 5 neighbors, side by side or one above the other, are
    alike. Tissue is textured: not even a pale or small tile comes near.
    """
    most = min(MASK_COLORS, image.width * image.height // MASK_PIXELS)
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA") or not most or image.getcolors(most) is None:
        return False
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    alike = [(pixels[1:] == pixels[:-1]).all(axis=-1), (pixels[:, 1:] == pixels[:, :-1]).all(axis=-1)]
    return bool(sum(map(np.count_nonzero, alike)) >= MASK_ALIKE * sum(each.size for each in alike))


def flatten(image: Image.Image) -> Image.Image:
    """RGB as seen on white glass: what is transparent becomes white."""
    if image.mode == "RGB":
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def encode(image: Image.Image, suffix: str, like: Image.Image | None = None) -> bytes:
    """The content of an image file, with the resolution, ICC profile and EXIF data of ``like``, as far as formats go.

    JPEG is written at quality 95 without chroma subsampling, all others without loss.

    Raises:
        ValueError: the format has no transparency, and the image has.
    """
    suffix = suffix.lower()
    if suffix == ".bmp" and image.mode == "RGBA":
        raise ValueError("not supported: BMP with transparency, convert it to PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        options = _options(suffix, like)
    # Not to a file: the codecs report a full disk in ways of their own.
    content = io.BytesIO()
    image.save(content, format=Image.registered_extensions()[suffix], **options)
    return content.getvalue()


def _options(suffix: str, like: Image.Image | None) -> dict[str, Any]:
    options = dict(_HOW.get(suffix, {}))
    if like is None:
        return options
    if "icc_profile" in like.info:
        options["icc_profile"] = like.info["icc_profile"]
    if hasattr(like, "tag_v2") and suffix in (".tif", ".tiff"):
        options["tiffinfo"] = _scale_tags(like.tag_v2)
        return options
    if _is_resolution(like.info.get("dpi")):
        options["dpi"] = like.info["dpi"]
    if exif := like.getexif():
        for tag, text in exif.items():
            exif[tag] = _as_stored(text)
        options["exif"] = exif
    return options


def _scale_tags(stored: Mapping[int, Any]) -> dict[int, Any]:
    """Of the tags of a TIFF those that say its scale: resolution, and the description of ImageJ, OME and others."""
    tags = ExifTags.Base
    kept: dict[int, Any] = {}
    if _is_resolution([stored.get(tag) for tag in (tags.XResolution, tags.YResolution)]):
        names = (tags.XResolution, tags.YResolution, tags.ResolutionUnit)
        kept = {tag: stored[tag] for tag in names if tag in stored}
    description = stored.get(tags.ImageDescription)
    # tifffile describes the layout of its pixels, which is another one here.
    if description and not str(description).startswith('{"shape"'):
        kept[tags.ImageDescription] = _as_stored(description)
    return kept


def _as_stored(value: Any) -> Any:
    """The bytes of a text of a tag, which Pillow reads as Latin-1 and would write as ASCII."""
    return value.encode("latin-1", "replace") if isinstance(value, str) else value


def _is_resolution(values: Any) -> bool:
    """Whether both sides of a resolution are given, finite and above 0: 0/0, for one, is none."""
    return values is not None and all(value is not None and 0 < value < math.inf for value in values)
