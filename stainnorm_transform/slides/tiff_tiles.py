"""Decoded tiles of one image of a TIFF, by tifffile and imagecodecs; strips are tiles as wide as the image."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from PIL import Image

from stainnorm_transform.slides.jpeg import Frame, decode_jpeg, frame_of
from stainnorm_transform.slides.tables import Pixels

# No scanner writes larger tiles, and OpenSlide ends the process where memory for one is missing.
TILE_PIXELS = 1 << 26
CONVERT = (
    "convert it to a tiled TIFF with JPEG compression, for example by: "
    "vips tiffsave INPUT OUTPUT.tif --tile --pyramid --bigtiff --compression jpeg"
)
# Decoded tiles are kept as far as they touch a region of this side, in bytes at least and at most.
_KEPT_SIDE = 1024
_KEPT_BYTES = 8 << 20, 256 << 20
# An uncompressed image in a single strip is read by so many rows.
_ROWS = 64
# None, LZW, Deflate (twice), PackBits, LZMA, Zstandard: what they give is in the color model that the page names.
_GENERAL = frozenset({1, 5, 8, 32946, 32773, 34925, 50000})
# LZW, Deflate (twice), LZMA, Zstandard: what a predictor may have been used with.
_PREDICTED = frozenset({5, 8, 32946, 34925, 50000})
_JPEG_2000_YCBCR = 33003
# Its decoder gives black, and no error, for data that is cut.
_JPEG_XR = frozenset({22610, 34934})


class Level:
    """The tiles of one image: of a page of RGB, or of three pages with a channel each.

    Decoding is safe in threads, and a tile that several ask for is decoded once.

    Args:
        file: the open ``tifffile.TiffFile``.
        pages: of the image.
        lock: held while the file is read.

    Attributes:
        width: in pixels.
        height: in pixels.

    Raises:
        ValueError: its tiles cannot be decoded.
    """

    def __init__(self, file: Any, pages: Sequence[Any], lock: threading.Lock) -> None:
        import tifffile

        self._file, self._file_lock = file.filehandle, lock
        page = self._page = pages[0]
        if page.compression not in tifffile.TIFF.DECOMPRESSORS or page.compression in _JPEG_XR:
            name = getattr(page.compression, "name", page.compression)
            raise ValueError(f"not supported: TIFF compression {name}; {CONVERT}")
        if page.compression not in _PREDICTED:
            # As libtiff, which writes the tag for others, but follows it for these only.
            for each in pages:
                each.predictor = tifffile.PREDICTOR.NONE
        self.width, self.height = page.imagewidth, page.imagelength
        check_image(self.width, self.height)
        is_apart = page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
        is_plain = page.compression == tifffile.COMPRESSION.NONE and page.fillorder == 1
        is_plain = is_plain and not is_apart and len(pages) == 1
        self._is_one_strip = is_plain and not page.is_tiled and len(page.dataoffsets) == 1
        if page.is_tiled:
            self.tile_width, self.tile_height = page.tilewidth, page.tilelength
        else:
            rows = _ROWS if self._is_one_strip else page.rowsperstrip
            self.tile_width, self.tile_height = self.width, min(rows, self.height)
        check_tile(self.tile_width, self.tile_height)
        self.columns, self.rows = -(-self.width // self.tile_width), -(-self.height // self.tile_height)
        # Where the channels are apart, a tile is one of each of these: a page, and the number of its first tile there.
        self._planes = [(each, 0) for each in pages]
        if is_apart:
            self._planes = [(page, number * self.columns * self.rows) for number in range(page.samplesperpixel)]
        tiles = (self._planes[-1][1] if is_apart else 0) + self.columns * self.rows
        if not self._is_one_strip and any(
            min(len(each.dataoffsets), len(each.databytecounts)) < tiles for each in pages
        ):
            raise ValueError(f"damaged: it lists fewer tiles than the {tiles} it has")
        self._is_jpeg = page.compression == tifffile.COMPRESSION.JPEG
        self._is_rgb = len(self._planes) == 1 and page.samplesperpixel == 3
        # tifffile makes a decoder when it is first asked for, for which it may read the file, with no lock.
        for each in pages:
            each.decode  # noqa: B018
        is_ycbcr = page.photometric == tifffile.PHOTOMETRIC.YCBCR and page.compression in _GENERAL
        self._is_ycbcr = is_ycbcr or page.compression == _JPEG_2000_YCBCR
        if is_ycbcr and tuple(page.subsampling or (1, 1)) != (1, 1):
            raise ValueError(f"not supported: subsampled colors without JPEG compression; {CONVERT}")
        extra = next(iter(page.extrasamples), None) if page.samplesperpixel == 4 else None
        self._is_premultiplied = extra == tifffile.EXTRASAMPLE.ASSOCALPHA
        self._channels = 4 if self._is_premultiplied or extra == tifffile.EXTRASAMPLE.UNASSALPHA else 3
        self._kept: OrderedDict[tuple[int, int], Future[Pixels | None]] = OrderedDict()
        self._most = self._tiles_kept()
        self._lock = threading.Lock()

    def is_sure_of_colors(self) -> bool:
        """Whether all decoders read the first tile in the same colors: no JPEG says others than the TIFF around it."""
        named = self._page.photometric.name
        if self._is_jpeg:
            first = self._read(self._page.dataoffsets[0], self._page.databytecounts[0])
            return frame_of(first).model in (None, named)
        return bool(named == "RGB")

    def place(self, column: int, row: int) -> tuple[int, int, int, int]:
        """(left, top, width, height) of a tile, as far as it lies in the image."""
        left, top = column * self.tile_width, row * self.tile_height
        return left, top, min(self.tile_width, self.width - left), min(self.tile_height, self.height - top)

    def touched(self, left: int, top: int, width: int, height: int) -> Iterator[tuple[int, int]]:
        """(column, row) of the tiles that a region touches."""
        right, bottom = min(left + width, self.width), min(top + height, self.height)
        for row in range(max(0, top) // self.tile_height, -(-bottom // self.tile_height)):
            for column in range(max(0, left) // self.tile_width, -(-right // self.tile_width)):
                yield column, row

    def region(
        self, left: int, top: int, width: int, height: int, tile: Callable[[int, int], Pixels | None] | None = None
    ) -> Pixels:
        """RGBA (height, width, 4), as far as there are tiles; elsewhere it is transparent.

        Args:
            left: of the region, in pixels.
            top: of the region, in pixels.
            width: of the region, in pixels.
            height: of the region, in pixels.
            tile: what gives a tile; by default, ``tile`` of this image.
        """
        out = np.zeros((height, width, 4), np.uint8)
        for place in self.touched(left, top, width, height):
            pixels = (tile or self.tile)(*place)
            if pixels is None:
                continue
            tile_left, tile_top, wide, high = self.place(*place)
            x0, x1 = max(left, tile_left), min(left + width, tile_left + wide)
            y0, y1 = max(top, tile_top), min(top + height, tile_top + high)
            part = pixels[y0 - tile_top : y1 - tile_top, x0 - tile_left : x1 - tile_left]
            target = out[y0 - top : y1 - top, x0 - left : x1 - left]
            if part.shape[2] == 4:
                target[:] = part
                continue
            # A channel at a time takes a tenth of the time.
            for channel in range(3):
                target[..., channel] = part[..., channel]
            target[..., 3] = 255
        return out

    def tile(self, column: int, row: int) -> Pixels | None:
        """The pixels of a tile, RGB or RGBA (H, W, 3 or 4), or None where the file has no such tile.

        Raises:
            ValueError: it is damaged; and errors of the decoders.
        """
        with self._lock:
            known = self._kept.pop((column, row), None)
            future = self._kept[column, row] = known or Future()
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        if known is None:
            try:
                future.set_result(self._decode(column, row))
            except BaseException as error:
                with self._lock:
                    self._kept.pop((column, row), None)
                future.set_exception(error)
        return future.result()

    def _tiles_kept(self) -> int:
        columns = min(self.columns, _KEPT_SIDE // self.tile_width + 2)
        rows = min(self.rows, _KEPT_SIDE // self.tile_height + 2)
        least, most = (size // (4 * self.tile_width * self.tile_height) for size in _KEPT_BYTES)
        return max(1, min(max(least, columns * rows), most))

    def _decode(self, column: int, row: int) -> Pixels | None:
        if self._is_one_strip:
            return self._rows(row)
        planes = []
        for page, first in self._planes:
            number = first + row * self.columns + column
            offset, size = page.dataoffsets[number], page.databytecounts[number]
            if not offset or not size:
                return None
            data = self._read(offset, size)
            if self._is_jpeg:
                frame = frame_of(data)
                self._check(frame)
                if self._is_rgb and frame.model in (None, page.photometric.name):
                    return decode_jpeg(data, page.jpegtables, page.photometric.name)
            planes.append(page.decode(data, number, jpegtables=page.jpegtables)[0][0])
        return self._in_rgb(np.concatenate(planes, axis=-1) if len(planes) > 1 else planes[0])

    def _check(self, frame: Frame) -> None:
        width, height, channels, _ = frame
        check_tile(width, height)
        if self._page.is_tiled and (width, height) != (self.tile_width, self.tile_height):
            raise ValueError(f"JPEG data of {width} x {height} pixels in a tile of another size")
        if self._is_rgb and channels != 3:
            raise ValueError(f"JPEG data of {channels} channel{'s' * (channels > 1)} in an image of 3")

    def _rows(self, row: int) -> Pixels | None:
        offset, size = self._page.dataoffsets[0], self._page.databytecounts[0]
        if not offset or not size:
            return None
        _, top, width, height = self.place(0, row)
        shape = height, width, self._page.samplesperpixel
        step = width * shape[2]
        if size < (top + height) * step:
            raise ValueError(f"its strip of {size} bytes ends before it")
        data = self._read(offset + top * step, height * step)
        return self._in_rgb(np.frombuffer(data, np.uint8).reshape(shape))

    def _read(self, offset: int, size: int) -> bytes:
        if offset + size > self._file.size:
            raise ValueError("the file ends before it")
        with self._file_lock:
            self._file.seek(offset)
            return bytes(self._file.read(size))

    def _in_rgb(self, pixels: Pixels) -> Pixels:
        pixels = pixels[..., : self._channels]
        if self._is_ycbcr:
            return np.asarray(_image("YCbCr", pixels[..., :3]).convert("RGB"))
        if self._is_premultiplied:
            return np.asarray(_image("RGBa", pixels).convert("RGBA"))
        return pixels


def _image(mode: str, pixels: Pixels) -> Image.Image:
    return Image.frombytes(mode, pixels.shape[1::-1], pixels.tobytes())


def check_image(width: int, height: int) -> None:
    """Raises ValueError for an image without pixels."""
    if width < 1 or height < 1:
        raise ValueError(f"damaged: an image of {width} x {height} pixels")


def check_tile(width: int, height: int) -> None:
    """Raises ValueError for tiles without pixels, or with too many."""
    if width < 1 or height < 1:
        raise ValueError(f"damaged: tiles of {width} x {height} pixels")
    if width * height > TILE_PIXELS:
        raise ValueError(f"not supported: tiles of {width} x {height} pixels, more than {TILE_PIXELS}; {CONVERT}")
