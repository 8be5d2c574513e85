"""Makes a slide of any size from tissue of CAMELYON17, to measure with.

python examples/make_slide.py --side 32768 --out gigapixel.tif

Tiles of one center, turned and flipped at random, lie side by side, on glass outside of an ellipse where --tissue is
below 1. Like a scanner's, the slide is a tiled pyramid of JPEG, with a resolution of 0.25 micrometers a pixel.
"""

import argparse
from pathlib import Path

import numpy as np
from camelyon17 import add_data_option, read_center
from PIL import Image
from tqdm import tqdm

from stainnorm_transform.cli.options import path_name
from stainnorm_transform.files import replacing
from stainnorm_transform.resources import cores
from stainnorm_transform.slides import SlideFormat, write_slide
from stainnorm_transform.slides.pyramid import TILE


class Mosaic:
    """What ``write_slide`` asks of a slide."""

    mpp = (0.25, 0.25)
    objective = 40.0
    icc_profile = None

    def __init__(self, tiles: list[np.ndarray], width: int, height: int, tissue: float, seed: int = 0) -> None:
        self.path = Path("mosaic")
        self.dimensions = (width, height)
        random = np.random.default_rng(seed)
        rows, columns = -(-height // TILE), -(-width // TILE)
        y, x = np.mgrid[:rows, :columns]
        distance = ((y + 0.5) / rows - 0.5) ** 2 + ((x + 0.5) / columns - 0.5) ** 2
        inside = distance <= np.quantile(distance, tissue)
        self.chosen = np.where(inside, random.integers(1, len(tiles) + 1, inside.shape), 0)
        glass = np.clip(random.normal(243, 1.5, (TILE, TILE, 4)), 0, 255).astype(np.uint8)
        self.tiles = [glass, *tiles]

    def pixels(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        out = np.empty((height, width, 4), np.uint8)
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                target = out[top : top + TILE, left : left + TILE]
                tile = self.tiles[self.chosen[(y + top) // TILE, (x + left) // TILE]]
                target[:] = tile[: target.shape[0], : target.shape[1]]
        return out

    def associated_images(self) -> dict[str, Image.Image]:
        return {}


def tissue_tiles(data: Path, center: int) -> list[np.ndarray]:
    """Tiles (TILE, TILE, 4) of a center, each in the eight ways to lay it."""
    tiles = []
    for image in read_center(data, center).values():
        pixels = np.pad(image.permute(1, 2, 0).numpy(), ((0, 0), (0, 0), (0, 1)), constant_values=255)
        for top in range(0, pixels.shape[0] - TILE + 1, TILE):
            for left in range(0, pixels.shape[1] - TILE + 1, TILE):
                tile = pixels[top : top + TILE, left : left + TILE]
                tiles += [np.rot90(side, turns) for side in (tile, tile[:, ::-1]) for turns in range(4)]
    return [np.ascontiguousarray(tile) for tile in tiles]


def make_slide(data: Path, out: Path, width: int, height: int, center: int = 2, tissue: float = 1.0) -> None:
    """Writes the slide, as JPEG of quality 80."""
    mosaic = Mosaic(tissue_tiles(data, center), width, height, tissue)
    with replacing(out) as temporary, tqdm(total=width * height, unit="px", unit_scale=True, disable=None) as bar:
        write_slide(mosaic, temporary, None, SlideFormat(quality=80), cores(), bar.update)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    parser.add_argument("--out", type=path_name, required=True, help="the slide to write, a .tif")
    parser.add_argument("--side", type=int, default=32768, help="width and height in pixels (default: %(default)s)")
    parser.add_argument("--center", type=int, default=2, help="center of the tissue (default: %(default)s)")
    parser.add_argument("--tissue", type=float, default=1.0, help="share that is tissue (default: %(default)s)")
    options = parser.parse_args()
    make_slide(options.data, options.out, options.side, options.side, options.center, options.tissue)


if __name__ == "__main__":
    main()
