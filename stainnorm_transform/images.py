"""Image files: finding, reading and writing them, and the contact sheet."""

from __future__ import annotations

import functools
import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from stainnorm_transform.files import check_regular

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
THUMBNAIL_SIDE = 256
# In TIFF the scale stands here; ImageJ and others say micrometers in the description.
KEPT_TAGS = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.XResolution,
    ExifTags.Base.YResolution,
    ExifTags.Base.ResolutionUnit,
)


def plan(found: Mapping[Path, Path], out: Path, reserved: Sequence[str] = ()) -> dict[Path, Path]:
    """Which file each image is written to: ``out`` plus a path below it.

    Args:
        found: each image with its path below ``out``.
        out: the folder to write to.
        reserved: names in ``out`` that are taken.

    Raises:
        ValueError: two images for one output, or an output that is an input or reserved.
    """
    outputs = {path: out / below for path, below in found.items()}
    sources: dict[Path, Path] = {}
    originals = {_identity(path) for path in outputs}
    for path, output in outputs.items():
        # The same file may have several names, by links, mounts or letter case.
        if os.path.exists(output) and _identity(output) in originals:
            raise ValueError(f"{output} is an input and would be overwritten: choose another output folder")
        if output in sources:
            raise ValueError(
                f"{sources[output]} and {path} would both be written to {output}: use two output folders, in two runs"
            )
        if output.relative_to(out).parts[0] in reserved:
            raise ValueError(f"{path} would be written to {output}, which is for something else: rename it")
        sources[output] = path
    return outputs


def find(inputs: Sequence[Path], skip: Path | None = None, suffixes: tuple[str, ...] = SUFFIXES) -> dict[Path, Path]:
    """The images among files and in folders, searched recursively: real path -> path below its input folder.

    Links to folders are not followed.

    Args:
        inputs: images and folders.
        skip: a folder not to search.
        suffixes: of images in folders.

    Raises:
        ValueError: an input does not exist, or there is no image.
        OSError: a folder cannot be read.
    """
    found: dict[Path, Path] = {}
    real = functools.cache(os.path.realpath)
    skipped = _identity(skip) if skip and skip.exists() else None
    for given in inputs:
        if not given.exists():
            raise ValueError(f"{given} does not exist")
        for path in _walk(given, skipped, suffixes) if given.is_dir() else [given]:
            below = path.relative_to(given) if given.is_dir() else Path(path.name)
            # Not abspath, for which link/../a is ./a.
            found.setdefault(Path(real(path.parent), path.name), below)
    if not found:
        raise ValueError(f"no images ({', '.join(suffixes)}) in {', '.join(str(given) for given in inputs)}")
    return found


def _identity(path: str | os.PathLike[str]) -> object:
    """What tells whether two paths lead to one file."""
    try:
        state = os.stat(path)
    except OSError:  # It is missing, or a link that leads nowhere or to itself.
        return os.path.realpath(path)
    return state.st_dev, state.st_ino


def _walk(folder: Path, skip: object, suffixes: tuple[str, ...]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for where, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if skip is None or _identity(os.path.join(where, name)) != skip)
        for name in sorted(files):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield Path(where) / name


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


def thumbnail(image: Image.Image) -> Image.Image:
    """A copy on white glass of at most ``THUMBNAIL_SIDE`` pixels a side."""
    small = flatten(image).copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return small


def contact_sheet(pairs: Sequence[tuple[str, Image.Image, Image.Image]], columns: int = 3) -> Image.Image:
    """Pairs of thumbnails under their captions: before on the left, after on the right."""
    font = ImageFont.load_default(12)
    margin, line = 8, 18
    width, height = 2 * THUMBNAIL_SIDE + margin, THUMBNAIL_SIDE + line
    columns = min(columns, len(pairs))
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * (width + 2 * margin), rows * (height + margin)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (caption, before, after) in enumerate(pairs):
        caption = " ".join(caption.encode(errors="replace").decode().split())
        x, y = index % columns * (width + 2 * margin) + margin, index // columns * (height + margin)
        while draw.textlength(caption, font) > width:
            caption = "..." + caption[4:]
        draw.text((x, y), caption, "black", font)
        sheet.paste(before, (x, y + line))
        sheet.paste(after, (x + THUMBNAIL_SIDE + margin, y + line))
    return sheet
