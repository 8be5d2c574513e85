"""The same task by torchstain and by NormalizeStain, side by side, for those who move from one to the other.

python examples/from_torchstain.py --tile examples/tiles/lab_c/tile_1.png --target examples/tiles/lab_a/tile_1.png
"""

import argparse
from pathlib import Path

import torch
import torchstain
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from stainnorm_transform import NormalizeStain
from stainnorm_transform.cli.options import file_name

TILES = Path(__file__).parent / "tiles"


def by_torchstain(tile: Image.Image, target: Image.Image) -> Tensor:
    """(H, W, 3), int32 in [0, 255]; ``IndexError`` for a blank tile."""
    to_255 = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32)])
    normalizer = torchstain.normalizers.MacenkoNormalizer(backend="torch")
    normalizer.fit(to_255(target))
    normalized, _hematoxylin, _eosin = normalizer.normalize(I=to_255(tile), stains=True)
    return normalized


def by_stainnorm(tile: Image.Image) -> Tensor:
    """(3, H, W), float32 in [0, 1]; a blank tile comes back as it is. There are no stain images."""
    # scale=True: floats in [0, 255] would be read as white, and come back unchanged.
    to_unit = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    # No fit: the weights are the target. For one of your own, the path of what `stainnorm train` wrote.
    normalize = NormalizeStain.pretrained()
    return normalize(to_unit(tile))


def describe(image: Tensor) -> str:
    return f"{tuple(image.shape)} {image.dtype}, {image.min():.3g} to {image.max():.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tile", type=file_name, default=TILES / "lab_c/tile_1.png")
    parser.add_argument("--target", type=file_name, default=TILES / "lab_a/tile_1.png", help="for torchstain")
    options = parser.parse_args()
    target = Image.open(options.target).convert("RGB")
    tiles = {"tile": Image.open(options.tile).convert("RGB"), "blank tile": Image.new("RGB", (256, 256), "white")}
    for name, tile in tiles.items():
        try:
            print(f"{name}, torchstain: {describe(by_torchstain(tile, target))}")
        except IndexError as problem:
            print(f"{name}, torchstain: IndexError: {problem}")
        print(f"{name}, stainnorm_transform: {describe(by_stainnorm(tile))}")


if __name__ == "__main__":
    main()
