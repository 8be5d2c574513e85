"""Reads a slide in normalized colors by libraries that open slides themselves: nothing is written.

python examples/read_normalized.py slide.svs

Each function gives the library's own object, which reads from a NormalizedSlide. The command reads the same tiles by
every library that is installed, and says how far they are from the slide's transform.
"""

import argparse
import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openslide

from stainnorm_transform import NormalizeStain
from stainnorm_transform.cli.options import file_name
from stainnorm_transform.slides import NormalizedSlide, Slide

SIDE = 256
Read = Callable[[int, int], np.ndarray]


def tiatoolbox_reader(slide: NormalizedSlide, path: Path) -> Any:
    """A reader of TIAToolbox: its patch extractors, tissue masks and engines read by it."""
    from tiatoolbox.wsicore.wsireader import OpenSlideWSIReader

    reader = OpenSlideWSIReader(path)
    reader.openslide_wsi = slide
    return reader


def wsidata_slide(slide: NormalizedSlide, path: Path) -> Any:
    """What LazySlide works on."""
    from wsidata import open_wsi

    wsi = open_wsi(str(path), reader="openslide", attach_thumbnail=False)
    wsi.reader.set_reader(slide)
    return wsi


def large_image_source(slide: NormalizedSlide, path: Path) -> Any:
    """A tile source of large_image, as HistomicsUI and its servers use."""
    import large_image_source_openslide

    source = large_image_source_openslide.open(str(path))
    source._openslide = slide
    return source


@contextlib.contextmanager
def opened_normalized(normalize: NormalizeStain) -> Iterator[None]:
    """While it lasts, code that calls ``openslide.open_slide`` gets normalized slides, as CLAM's and STAMP's does."""
    before = openslide.open_slide
    openslide.open_slide = lambda path: NormalizedSlide(path, normalize)
    try:
        yield
    finally:
        openslide.open_slide = before


def by_tiatoolbox(slide: NormalizedSlide, path: Path) -> Read:
    reader = tiatoolbox_reader(slide, path)
    return lambda x, y: reader.read_rect((x, y), (SIDE, SIDE), resolution=0, units="level")


def by_wsidata(slide: NormalizedSlide, path: Path) -> Read:
    wsi = wsidata_slide(slide, path)
    return lambda x, y: wsi.read_region(x, y, SIDE, SIDE, level=0)


def by_large_image(slide: NormalizedSlide, path: Path) -> Read:
    source = large_image_source(slide, path)

    def read(x: int, y: int) -> np.ndarray:
        region = {"left": x, "top": y, "width": SIDE, "height": SIDE, "units": "base_pixels"}
        return source.getRegion(region=region, format="numpy")[0][..., :3]

    return read


def by_open_slide(slide: NormalizedSlide, path: Path) -> Read:
    with opened_normalized(slide.normalize):
        opened = openslide.open_slide(path)
    return lambda x, y: np.asarray(opened.read_region((x, y), 0, (SIDE, SIDE)).convert("RGB"))


READERS: dict[str, Callable[[NormalizedSlide, Path], Read]] = {
    "tiatoolbox": by_tiatoolbox,
    "wsidata": by_wsidata,
    "large_image_source_openslide": by_large_image,
    "openslide": by_open_slide,
}


def difference(read: Read, slide: NormalizedSlide, path: Path, tiles: int) -> tuple[int, int]:
    """How many tiles were read, and by how many levels they are off at most."""
    width, height = slide.dimensions
    columns, rows = (np.linspace(0, max(0, length - SIDE), round(tiles**0.5)).astype(int) for length in (width, height))
    most = 0
    with Slide(path) as plain:
        for y in rows.tolist():
            for x in columns.tolist():
                expected = slide.normalize(plain.read(x, y, SIDE, SIDE)).permute(1, 2, 0).numpy()
                most = max(most, int(np.abs(read(x, y).astype(int) - expected).max()))
    return len(rows) * len(columns), most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=file_name)
    parser.add_argument("--tiles", type=int, default=100, help="(default: %(default)s)")
    options = parser.parse_args()
    try:
        slide = NormalizedSlide(options.slide, NormalizeStain.pretrained())
    except ValueError as error:
        parser.error(f"{options.slide}: {error}")
    for name, make in READERS.items():
        if not importlib.util.find_spec(name):
            print(f"{name}: not installed")
            continue
        # A library may close what it was given.
        with NormalizedSlide(options.slide, slide.normalize) as given:
            count, most = difference(make(given, options.slide), given, options.slide, options.tiles)
        print(f"{name}: {count} tiles, off by {most}")
    slide.close()


if __name__ == "__main__":
    main()
