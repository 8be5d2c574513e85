"""Images, slides and commands for tests."""

import csv
import functools
import struct
import zlib
from pathlib import Path

import numpy as np
import openslide
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms
from render_tiles import LABS, render_tile
from torchvision.transforms.v2.functional import to_pil_image

ROOT = Path(__file__).parent.parent


def make_slide(path, pixels, tile=(240, 240), levels=(4,), compression="zlib", mpp=0.5, objective=20, **options):
    """A slide in Aperio's layout of pixels (H, W, 3), by tifffile, with a thumbnail and smaller levels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = pixels.shape[:2]
    details = (f"|AppMag = {objective}" if objective else "") + (f"|MPP = {mpp}" if mpp else "")
    base = {"photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        text = f"Aperio Image Library v0\n{width}x{height} ({tile[0]}x{tile[1]}){details}"
        file.write(pixels, tile=tile, compression=compression, description=text, **base, **options)
        small = pixels[:: max(1, height // 100), :: max(1, width // 100)]
        file.write(np.ascontiguousarray(small), description="Aperio Image Library v0\nthumbnail", **base)
        for downsample in levels:
            level = F.avg_pool2d(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float(), downsample).round().byte()
            file.write(level.permute(1, 2, 0).numpy(), tile=tile, compression=compression, description=text, **base)
        for number, name in ((1, "label"), (9, "macro")):
            image = np.full((40, 60, 3), 200 + number, np.uint8)
            file.write(image, subfiletype=number, description=f"Aperio Image Library v0\n{name} 60x40", **base)
    return path


@functools.cache
def _tiles(lab):
    return [render_tile(seed, 256, LABS[lab]).permute(1, 2, 0).numpy() for seed in range(5)]


def tissue(height, width, lab="lab_a"):
    """Synthetic tissue (H, W, 3): five tiles, in turn."""
    tiles = _tiles(lab)
    rows = [
        np.concatenate([tiles[(row + column) % 5] for column in range(-(-width // 256))], 1)
        for row in range(-(-height // 256))
    ]
    return np.ascontiguousarray(np.concatenate(rows)[:height, :width])


def png(width, height, *chunks, bits=8):
    """A PNG file of mode RGB, chunk by chunk: (kind, content)."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in [(b"IHDR", header), *chunks, (b"IEND", b"")])


def save(path, image=None, **options):
    """Writes an image, by default a tile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (to_pil_image(render_tile()) if image is None else image).save(path, **options)
    return path


def disks(draws, size):
    """An instance map (size, size) of round nuclei, some of which touch, and its image (3, size, size)."""
    y, x = np.mgrid[:size, :size]
    instances = np.zeros((size, size), np.int64)
    for number in range(size * size // 400):
        row, column = draws.integers(0, size, 2)
        inside = (y - row) ** 2 + (x - column) ** 2 <= draws.integers(5, 9) ** 2
        # Others are only touched, so that every nucleus is whole.
        if not (instances[inside]).any():
            instances[inside] = number + 1
    colors = np.where(instances[..., None] > 0, (105, 75, 150), (225, 165, 200))
    pixels = (colors + draws.normal(0, 8, (size, size, 3))).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(instances), torch.from_numpy(pixels).permute(2, 0, 1)


def make_monuseg(folder, count=6, size=144):
    """Images of disks with their instance maps and organs in the layout of MoNuSeg, and a center of CAMELYON17."""
    organs = ["id,organ"]
    for number in range(count):
        instances, image = disks(np.random.default_rng(number), size)
        name = f"TCGA-{'AB'[number % 2]}{number // 2}-000{number}-01Z"
        save(folder / f"monuseg/images/{name}.png", to_pil_image(image))
        save(folder / f"monuseg/instances/{name}.png", Image.fromarray(instances.numpy().astype(np.uint16)))
        organs.append(f"{name},{'Kidney' if number % 3 else 'Liver'}")
    (folder / "monuseg/organs.csv").write_text("\n".join(organs) + "\n")
    for seed in range(2):
        save(folder / f"camelyon17/center_1/{seed}.png", to_pil_image(render_tile(seed, 96)))
    return folder


def on_glass(pixels, height, width):
    """Tissue in the middle of glass."""
    out = np.full((height, width, 3), 245, np.uint8)
    top, left = (height - pixels.shape[0]) // 2, (width - pixels.shape[1]) // 2
    out[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return out


def damage(path, level=0, tile=3):
    """Overwrites the end of a compressed tile."""
    with tifffile.TiffFile(path) as tiff:
        page = [page for page in tiff.pages if page.is_tiled][level]
        where, length = page.dataoffsets[tile], page.databytecounts[tile]
    with path.open("r+b") as file:
        file.seek(where)
        file.write(b"\xff" * length)
    return path


@functools.cache  # it holds the second at which it was made
def swapped_profile():
    """sRGB with red and blue exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    a, b = (profile.index(name) + 4 for name in (b"rXYZ", b"bXYZ"))
    profile[a : a + 8], profile[b : b + 8] = profile[b : b + 8], profile[a : a + 8]
    return bytes(profile)


def write_ome(path, *images, metadata=None, **options):
    """An OME-TIFF of several series."""
    with tifffile.TiffWriter(path, ome=True) as file:
        for image in images:
            options = {"tile": (128, 128), "photometric": "rgb", **options}
            file.write(image, metadata={"axes": "YXS", **(metadata or {})}, **options)
    return path


def make_tiles(folder, count):
    return [save(folder / f"{n:04}.png", to_pil_image(render_tile(n % 7, 64))) for n in range(count)]


def rows(out):
    with (out / "offsets.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def levels_of(path):
    """The pixels of every level, by tifffile."""
    with tifffile.TiffFile(path) as tiff:
        return [level.asarray() for level in tiff.series[0].levels]


def by_openslide(path, level=0):
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]).convert("RGB"))
