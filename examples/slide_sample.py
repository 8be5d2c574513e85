"""How many tiles of a slide its color map takes, and what pen and folds do to it.

python examples/slide_sample.py slide.svs other.tif

The map of all tiles with tissue is the truth; those of samples of n of them are compared with it: an error is how far
apart in (a*, b*) both put the colors of the slide's tissue, as a root mean square, in Lab units. Every slide gives 20
samples of each size, which begin at different places of the even order that ``slide_normalizer`` takes. Then part of
the sampled tiles is covered by strokes of a pen, or darkened as by a fold, and the same is asked of the map of all
tiles and of the map without those that are far from the median.
"""

import argparse

import torch
from torch import Tensor
from tqdm import tqdm

from stainnorm_transform import NormalizeStain
from stainnorm_transform.cli.options import file_name
from stainnorm_transform.estimate import map_of, offset_of, robust_sum, tissue_sums
from stainnorm_transform.resources import cores, in_order
from stainnorm_transform.slides import Slide
from stainnorm_transform.slides.sampling import SAMPLED_TILES, places, sampled_side

SIZES = (16, 32, 64, 128, 192, 256)
STARTS = 20
INKS = {"blue pen": (30, 60, 190), "green pen": (20, 130, 70), "black pen": (25, 25, 30)}


def sums_of_tiles(slide: Slide, normalize: NormalizeStain, most: int, change=lambda tile: tile) -> Tensor:
    """``tissue_sums`` of tiles with tissue in the order of sampling: (N, 6, 4)."""
    side = sampled_side(slide)
    corners = list(places(slide, side, cores()))[:most]
    tiles = in_order(lambda corner: slide.read(*corner, side, side), corners, cores())
    with torch.no_grad():
        found = [
            tissue_sums(normalize.network, change(tile), normalize.preserve_white)
            for tile in tqdm(tiles, total=len(corners), disable=None)
        ]
    return torch.stack([sums for sums in found if sums[0, 0] > 0])


def distance(first: Tensor, second: Tensor, sums: Tensor) -> Tensor:
    """How far apart maps (..., 2, 4) put the colors of the tissue of ``tissue_sums``: root mean square, shape (...).

    Dark pixels count more, as in the sums, and pale ones, which take only part of a shift, less.
    """
    difference, moments = first - second, sums[..., :4, :] / sums[..., :1, :1]
    square = (difference @ moments * difference).sum(dim=(-1, -2))
    return square.clamp(min=0).sqrt()


def pen(tile: Tensor, color: tuple[int, int, int]) -> Tensor:
    """A wide stroke that lets some tissue through."""
    height, width = tile.shape[-2:]
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    stroke = ((y - 0.3 - 0.4 * x).abs() < 0.25).float()
    ink = torch.tensor(color)[:, None, None] / 255
    return (tile * (1 - stroke + stroke * (0.25 + 0.75 * ink) * ink)).round().to(torch.uint8)


def fold(tile: Tensor) -> Tensor:
    """Tissue that lies twice: what passes passes twice."""
    return (255 * (tile / 255) ** 2).round().to(torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "slides",
        nargs="+",
        type=file_name,
        metavar="SLIDE",
        help="a slide; https://openslide.cs.cmu.edu/download/openslide-testdata has some",
    )
    parser.add_argument("--most", type=int, default=2048, help="tiles that are all of a slide (default: %(default)s)")
    options = parser.parse_args()
    normalize = NormalizeStain.pretrained()
    errors: dict[int, list[Tensor]] = {size: [] for size in SIZES}
    covered: dict[tuple[str, float], list[tuple[Tensor, Tensor]]] = {}
    for path in options.slides:
        with Slide(path) as slide:
            sums = sums_of_tiles(slide, normalize, options.most)
            total = robust_sum(sums)
            truth, (a, b) = map_of(total, normalize.slopes), offset_of(total).tolist()
            alone = distance(map_of(sums, normalize.slopes), truth, sums)
            print(f"{path.name}: {len(sums)} tiles with tissue, offset {a:.2f}, {b:.2f}", end="; ")
            print(f"deviation of a tile, over its own tissue, {alone.square().mean().sqrt():.2f}")
            for size in SIZES:
                for start in range(STARTS):
                    if size < len(sums):
                        part = sums.roll(-start * len(sums) // STARTS, dims=0)[:size]
                        errors[size].append(distance(map_of(robust_sum(part), normalize.slopes), truth, total))
            clean = sums[:SAMPLED_TILES]
            spoils = {name: lambda tile, color=color: pen(tile, color) for name, color in INKS.items()} | {"fold": fold}
            for name, spoil in spoils.items():
                spoiled = sums_of_tiles(slide, normalize, SAMPLED_TILES, spoil)
                for share in (0.1, 0.2, 0.3):
                    count = min(int(share * len(clean)), len(spoiled))
                    mixed = torch.cat([clean[count:], spoiled[:count]])
                    maps = map_of(torch.stack([mixed.sum(dim=0), robust_sum(mixed)]), normalize.slopes)
                    moved = distance(maps, truth, total)
                    covered.setdefault((name, share), []).append((moved[0], moved[1]))
    print("\n| tiles | median error | 95 % | max | n |\n| --- | --- | --- | --- | --- |")
    for size, found in errors.items():
        if found:
            e = torch.stack(found)
            print(f"| {size} | {e.median():.2f} | {e.quantile(0.95):.2f} | {e.max():.2f} | {len(e)} |")
    print("\n| spoiled | share of tiles | map of all: error, median and max | without far ones |")
    print("| --- | --- | --- | --- |")
    for (name, share), found in covered.items():
        plain, robust = (torch.stack(column) for column in zip(*found, strict=True))
        cells = [f"{errors.median():.2f}, {errors.max():.2f}" for errors in (plain, robust)]
        print(f"| {name} | {share:.0%} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
