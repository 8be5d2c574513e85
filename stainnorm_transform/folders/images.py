"""Image files: reading and writing them, and a dataset of them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from stainnorm_transform.files import check_regular

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
# In TIFF the scale stands here; ImageJ and others say micrometers in the description.
KEPT_TAGS = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.XResolution,
    ExifTags.Base.YResolution,
    ExifTags.Base.ResolutionUnit,
)


def read(path: Path) -> Image.Image:
    """Reads an image file of mode RGB or RGBA; palettes are resolved.

    Raises:
        ValueError: it is grey, has more than 8 bits a channel, more than one page, or another color model or suffix.
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
    except (ValueError, MemoryError, Image.DecompressionBombError, UnidentifiedImageError):
        raise
    except Exception as error:  # Pillow's decoders let errors of every kind through.
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"damaged image ({type(error).__name__}: {error})") from error


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        if _bits(image) > 8:  # Pillow would drop the lower bits in silence.
            raise ValueError("16 bits a channel: convert it to 8 bits first")
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError("more than one page, of which only the first would be kept: split it first")
        image.load()
        if image.mode in ("1", "L", "LA", "I", "F"):
            raise ValueError(f"a grey image (mode {image.mode}) has no stain color")
        if image.mode == "P" or "transparency" in image.info:
            resolved = image.convert("RGBA" if "transparency" in image.info else "RGB")
            resolved.info = {key: value for key, value in image.info.items() if key != "transparency"}
            return resolved
        if image.mode not in ("RGB", "RGBA"):
            raise ValueError(f"color model {image.mode}: convert it to RGB first")
        return image


def _bits(image: Image.Image) -> int:
    """Bits a channel of an image file that is open but not loaded."""
    if isinstance(image, TiffImageFile):
        return int(max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (8,))))
    return 16 if ";16" in str(image.tile) else 8  # type: ignore[attr-defined]


class ImageFiles(Dataset[Tensor]):
    """The images of files as uint8 tensors (3, H, W), on white glass where transparent.

    Args:
        paths: the files.
        memory: how many bytes of images to keep, instead of reading them again.
    """

    def __init__(self, paths: Sequence[Path], memory: int = 1 << 30) -> None:
        self.paths = list(paths)
        self.memory = memory
        self.kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        if index in self.kept:
            return self.kept[index]
        try:
            image = pil_to_tensor(flatten(read(self.paths[index])))
        except Exception as error:
            raise ValueError(f"{self.paths[index]}: {error or type(error).__name__}") from error
        if image.nbytes <= self.memory:
            self.memory -= image.nbytes
            self.kept[index] = image
        return image

    def __getstate__(self) -> dict[str, Any]:
        # Processes that do not share memory read what they need themselves.
        return {"paths": self.paths, "memory": 0, "kept": {}}


def flatten(image: Image.Image) -> Image.Image:
    """RGB as seen on white glass: what is transparent becomes white."""
    if image.mode == "RGB":
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def encode(image: Image.Image, suffix: str, like: Image.Image | None = None) -> bytes:
    """The content of an image file, with the resolution, ICC profile and EXIF data of ``like``.

    JPEG is written at quality 95 without chroma subsampling, TIFF with lossless compression.
    """
    suffix = suffix.lower()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        options = _options(suffix, like)
    # Not to a file: the codecs report a full disk in ways of their own.
    content = io.BytesIO()
    image.save(content, format=Image.registered_extensions()[suffix], **options)
    return content.getvalue()


def _options(suffix: str, like: Image.Image | None) -> dict[str, Any]:
    info = like.info if like else {}
    options: dict[str, Any] = {key: info[key] for key in ("dpi", "icc_profile") if key in info}
    if suffix in (".jpg", ".jpeg"):
        options |= {"quality": 95, "subsampling": 0}
    if suffix in (".tif", ".tiff"):
        options["compression"] = "tiff_adobe_deflate"
        if isinstance(like, TiffImageFile):
            options.pop("dpi", None)
            options["tiffinfo"] = {tag: like.tag_v2[tag] for tag in KEPT_TAGS if tag in like.tag_v2}
            # tifffile describes the layout of its pixels, which is another one here.
            if str(options["tiffinfo"].get(ExifTags.Base.ImageDescription, "")).startswith('{"shape"'):
                del options["tiffinfo"][ExifTags.Base.ImageDescription]
    elif like and like.getexif():
        options["exif"] = like.getexif()
    return options
