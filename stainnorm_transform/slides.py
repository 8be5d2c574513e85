"""Whole slides: reading them, one offset for each, and their tissue as a dataset of tiles.

OpenSlide reads them, and tiffslide those that are OME-TIFF: ``pip install "stainnorm-transform[slides]"``.
"""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import math
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from stainnorm_transform.color import TABLE_SIZE, rgb_to_lab
from stainnorm_transform.estimate import TISSUE_CHROMA, TISSUE_LIGHTNESS, robust_mean_offset, tissue_sums
from stainnorm_transform.files import check_regular
from stainnorm_transform.transform import NormalizeStain

Pixels = NDArray[np.uint8]
# Of formats that hold nothing but slides. A TIFF may be either.
SUFFIXES = (".svs", ".ndpi", ".mrxs", ".vms", ".vmu", ".scn", ".bif", ".svslide", ".czi", ".dcm")
# A tiled TIFF of one page is a slide from this many pixels on.
SLIDE_PIXELS = 1 << 26
OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
Item = TypeVar("Item")
Result = TypeVar("Result")

# Of a slide, the estimate sees up to this many tiles with tissue, of this side: 512 pixels at 40x.
SAMPLED_TILES = 192
SAMPLED_MICROMETERS = 128.0
SAMPLED_SIDES = (128, 1024)
# It looks for them at up to this many places; slides with small levels show beforehand where tissue is.
SAMPLED_PLACES = 8 * SAMPLED_TILES
# The map of the tissue has this many pixels to a side of a tile.
MAP_SCALE = 4
# What is 40x and 20x, where a slide only says that.
OBJECTIVE_TIMES_MPP = 10.0
_READ_SIDE = 1024
_MICROMETERS = {"nm": 1e-3, "µm": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}
_STRIP_PIXELS = 1 << 16


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
        properties = self._reader.properties
        self.level_dimensions: list[tuple[int, int]] = [tuple(size) for size in self._reader.level_dimensions]
        self.level_downsamples: list[float] = [float(value) for value in self._reader.level_downsamples]
        self.dimensions = self.level_dimensions[0]
        if tiff.ome is None:
            mpp = [_positive(properties.get(f"openslide.mpp-{axis}")) for axis in "xy"]
            self.objective = _positive(properties.get("openslide.objective-power"))
        else:
            mpp, self.objective = _ome_metadata(tiff.ome)
        self.mpp = None if mpp[0] is None or mpp[1] is None else (mpp[0], mpp[1])
        # The files of one DICOM slide agree in it.
        self.series = str(properties.get("dicom.SeriesInstanceUID"))
        self._background = _rgba(properties.get("openslide.background-color"))
        self.icc_profile = tiff.icc_profile or _icc_profile(self._reader)
        self._colors: NDArray[np.int32] | None = None
        if to_srgb and self.icc_profile:
            self._colors = _srgb_table(self.icc_profile, self.path)
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
        try:
            region = self._reader.read_region((x, y), level, (width, height))
        except Exception as error:
            raise ValueError(f"damaged at x = {x}, y = {y} of {width} x {height} pixels: {_what(error)}") from error
        if region.mode != "RGBA":
            region = region.convert("RGBA")
        pixels = np.asarray(region)
        if pixels[..., 3].min() < 255:
            pixels = np.asarray(Image.alpha_composite(Image.new("RGBA", region.size, self._background), region))
        return pixels if self._colors is None else look_up_pixels(pixels, self._colors)

    def associated_images(self) -> dict[str, Image.Image]:
        """The images of mode RGB beside the scan, by name: of the label, of the whole glass (macro), a thumbnail."""
        return {name: image.convert("RGB") for name, image in self._reader.associated_images.items()}

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
            with contextlib.suppress(OSError):
                values = (line.partition("=")[2].strip() for line in path.read_text(errors="replace").splitlines())
                parts |= {path.with_name(value) for value in values if value and "/" not in value}
    seen: set[tuple[Path, str]] = set()
    for path in paths:
        if path.suffix.lower() == ".dcm":
            with contextlib.suppress(ImportError, ValueError, OSError), Slide(path) as slide:
                series = path.parent, slide.series
                if series in seen:
                    parts.add(path)
                seen.add(series)
    return [path for path in paths if path not in parts]


def slide_normalizer(
    slide: Slide, normalize: NormalizeStain, threads: int | None = None
) -> tuple[NormalizeStain, int | None]:
    """The transform of a slide: ``normalize.for_slide`` of a sample of its tissue, spread evenly and always the same.

    Tissue is sought on a small level, where there is one. Tiles whose color is far from that of most others, by pen,
    folds or dirt, do not count.

    Args:
        slide: an open slide.
        normalize: the target; if its offset is fixed, it is the transform of the slide.
        threads: to read with; default: as many as there are cores.

    Returns:
        The transform, which takes away nothing where no tissue was found, and how many tiles with tissue it is based
        on: None if the offset was fixed before.
    """
    if normalize.offset is not None:
        return normalize, None
    threads = threads or cores()
    side = _sampled_side(slide)
    device = normalize.network.device
    sums: list[Tensor] = []

    def read(corner: tuple[int, int]) -> Tensor:
        size = (min(side, slide.dimensions[0]), min(side, slide.dimensions[1]))
        return slide.read(*corner, *size)

    places = itertools.islice(_places(slide, side, threads), SAMPLED_PLACES)
    with one_torch_thread(), torch.no_grad(), contextlib.closing(in_order(read, places, threads)) as tiles:
        for tile in tiles:
            found = tissue_sums(normalize.network, tile.to(device))
            if found[2] > 0:
                sums.append(found)
            if len(sums) == SAMPLED_TILES:
                break
    total = torch.stack(sums) if sums else torch.zeros(0, 3, device=device)
    fixed = NormalizeStain(
        normalize.network,
        normalize.preserve_white,
        target=normalize.target,
        recipe=normalize.recipe,
        offset=robust_mean_offset(total),
    )
    return fixed, len(sums)


def _sampled_side(slide: Slide) -> int:
    mpp = slide.mpp[0] if slide.mpp else OBJECTIVE_TIMES_MPP / (slide.objective or 40)
    low, high = SAMPLED_SIDES
    return min(max(round(SAMPLED_MICROMETERS / mpp), low), high)


def _places(slide: Slide, side: int, threads: int) -> Iterator[tuple[int, int]]:
    """Corners of tiles, of those that may have tissue: first those with much, and spread evenly at any time."""
    columns, rows = (max(1, length // side) for length in slide.dimensions)
    # Multiples of the golden ratio, modulo 1, are spread evenly, however many there are.
    order = np.argsort(np.arange(rows * columns) * ((math.sqrt(5) - 1) / 2) % 1, kind="stable")
    if slide.level_downsamples[slide.level_for(side / MAP_SCALE)] >= MAP_SCALE:
        share = tissue_shares(slide, side, threads).flatten()
        order = np.concatenate([order[share[order] >= 0.5], order[(share[order] > 0) & (share[order] < 0.5)]])
    for cell in order.tolist():
        yield cell % columns * side, cell // columns * side


def tissue_shares(slide: Slide, side: float, threads: int) -> NDArray[np.float32]:
    """How much of each tile is tissue, by color alone: (rows, columns), of tiles of ``side`` pixels of level 0.

    Tiles that are not whole, at the right and below, are left out, unless there are no others.
    """
    columns, rows = (max(1, int(length / side + 1e-6)) for length in slide.dimensions)
    small, scale = slide.reduced(max(1.0, side / MAP_SCALE), threads)
    lab = rgb_to_lab(torch.from_numpy(small[..., :3]).permute(2, 0, 1)[None] / 255)
    low, high = TISSUE_LIGHTNESS
    colored = lab[:, 1:2] ** 2 + lab[:, 2:] ** 2 > TISSUE_CHROMA**2
    tissue = (colored & (lab[:, :1] > low) & (lab[:, :1] < high)).float()
    whole = tissue[..., : max(1, round(rows * side / scale)), : max(1, round(columns * side / scale))]
    shares: NDArray[np.float32] = F.adaptive_avg_pool2d(whole, (rows, columns))[0, 0].numpy()
    return shares


class SlideTiles(Dataset[dict[str, Any]]):
    """The tissue of a slide as normalized tiles, side by side, for a data loader: nothing is written.

    Every item is a dict of ``image``, uint8 (3, side, side); ``x`` and ``y``, its upper left corner in pixels of
    level 0; and ``level``, which it was read from.

    Args:
        path: of the slide.
        normalize: the target, of which the slide gets one offset; if that is fixed, it is taken as it is. None leaves
            the colors as they are.
        side: of a tile in pixels.
        level: to read from.
        mpp: micrometers a pixel to scale to, instead of a level: 0.5 is 20x.
        min_tissue: share of a tile that must be tissue.
        to_srgb: as for ``Slide``.

    Attributes:
        normalize: the transform of the slide, with its offset, or None.
        corners: (x, y) of each tile.

    Raises:
        ValueError: there is no such level, or ``mpp`` is asked for of a slide that has none; and as for ``Slide``.

    Example::

        tiles = SlideTiles("slide.svs", NormalizeStain.pretrained(), side=224, mpp=0.5)
        for batch in DataLoader(tiles, batch_size=64, num_workers=4):
            features = model(v2.functional.to_dtype(batch["image"], torch.float32, scale=True))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        normalize: NormalizeStain | None,
        side: int = 256,
        level: int = 0,
        mpp: float | None = None,
        min_tissue: float = 0.25,
        to_srgb: bool = False,
    ) -> None:
        if side < 1:
            raise ValueError(f"expected a side of 1 pixel or more, got {side}")
        if level and mpp is not None:
            raise ValueError(f"expected a level or an mpp, got both: {level} and {mpp}")
        self.path, self.side, self.to_srgb = Path(path), side, to_srgb
        self._slides: dict[int, Slide] = {}
        slide = self._slide()
        if not 0 <= level < len(slide.level_dimensions):
            raise ValueError(f"expected a level from 0 to {len(slide.level_dimensions) - 1}, got {level}")
        downsample = slide.level_downsamples[level]
        if mpp is not None:
            if slide.mpp is None:
                raise ValueError(f"{path} does not say its resolution: choose a level instead of mpp={mpp}")
            if not 0 < mpp < math.inf:
                raise ValueError(f"expected micrometers a pixel above 0, got {mpp}")
            downsample = mpp / slide.mpp[0]
            level = slide.level_for(downsample)
        self.level = level
        self._read_side = max(1, round(side * downsample / slide.level_downsamples[level]))
        self.normalize = slide_normalizer(slide, normalize)[0] if normalize else None
        rows, columns = np.nonzero(tissue_shares(slide, side * downsample, cores()) >= min_tissue)
        self.corners = [
            (round(column * side * downsample), round(row * side * downsample))
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = self.corners[index]
        image = self._slide().read(x, y, self._read_side, self._read_side, self.level)
        if self._read_side != self.side:
            whole = Image.fromarray(image.permute(1, 2, 0).numpy())
            image = pil_to_tensor(whole.resize((self.side, self.side), Image.Resampling.BICUBIC, reducing_gap=None))
        if self.normalize is not None:
            image = self.normalize(image)
        return {"image": image.contiguous(), "x": x, "y": y, "level": self.level}

    def _slide(self) -> Slide:
        """The slide, opened once in each process."""
        process = os.getpid()
        if process not in self._slides:
            self._slides = {process: Slide(self.path, self.to_srgb)}
        return self._slides[process]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slides": {}}


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


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keeps torch from splitting small work among threads, which wait for each other where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def corners(width: int, height: int, side: int) -> Iterator[tuple[int, int]]:
    """(x, y) of the tiles of an image, row by row."""
    return ((x, y) for y in range(0, height, side) for x in range(0, width, side))


def in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Generator[Result]:
    """As ``map``, in threads, a few items ahead and no more, so that memory is bounded."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[Future[Result]] = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Tiff(NamedTuple):
    """What is looked up in a TIFF file besides: its OME-XML, and the ICC profile as it is stored."""

    ome: str | None = None
    icc_profile: bytes | None = None


def _open(path: Path) -> tuple[Any, _Tiff]:
    """The reader of a slide."""
    check_regular(path)
    try:
        import imagecodecs  # noqa: F401
        import openslide
        import tifffile
        import tiffslide
    except ImportError as error:
        raise ImportError(
            f'reading slides takes more packages: pip install "stainnorm-transform[slides]" ({error})'
        ) from error
    try:
        tiff = _check_tiff(tifffile, path)
        return openslide.OpenSlide(path) if tiff.ome is None else tiffslide.TiffSlide(path), tiff
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise ValueError("not a slide of a format that OpenSlide reads, nor OME-TIFF") from error
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # tifffile and tiffslide let errors of every kind through.
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"damaged slide ({_what(error)})") from error


def _check_tiff(tifffile: Any, path: Path) -> _Tiff:
    """Raises ValueError for a TIFF that is not 8-bit RGB."""
    try:
        file = tifffile.TiffFile(path)
    except tifffile.TiffFileError:
        return _Tiff()
    with file:
        page = max((page.aspage() for page in file.pages), key=lambda page: page.imagelength * page.imagewidth)
        if page.samplesperpixel not in (3, 4) or page.bitspersample != 8:
            raise ValueError(f"expected 8-bit RGB, got {page.samplesperpixel} channels of {page.bitspersample} bits")
        return _Tiff(file.ome_metadata if file.is_ome else None, page.iccprofile)


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
    objective, pixels = root.find(".//{*}Objective"), root.find(".//{*}Pixels")
    magnification = None if objective is None else _positive(objective.get("NominalMagnification"))
    mpp: list[float | None] = []
    for axis in "XY":
        size = None if pixels is None else _positive(pixels.get(f"PhysicalSize{axis}"))
        unit = _MICROMETERS.get("µm" if pixels is None else pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        mpp.append(None if size is None or unit is None else size * unit)
    return mpp, magnification


def _icc_profile(reader: Any) -> bytes | None:
    profile = getattr(reader, "color_profile", None)
    return profile.tobytes() if profile is not None else None


def _srgb_table(icc_profile: bytes, path: Path) -> NDArray[np.int32]:
    """What every uint8 color is in sRGB, as ``color.shift_table``."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        convert = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), "RGB", "RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise ValueError(f"the ICC profile of {path} cannot be used: {_what(error)}") from error
    table = np.arange(TABLE_SIZE, dtype="<i4").view(np.uint8).reshape(256, 256, 256, 4)
    for colors in table:
        converted = ImageCms.applyTransform(Image.fromarray(np.ascontiguousarray(colors[..., :3])), convert)
        colors[..., :3] = np.asarray(converted)
    return table.view("<i4").reshape(-1)
