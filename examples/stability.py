"""Measures how far the estimated offset moves when an image changes in ways that should not move it.

python examples/stability.py

Reads CAMELYON17, CAMELYON16 and MoNuSeg tiles; prints distances in (a*, b*), in Lab units.
"""

import argparse
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from camelyon17 import add_data_option, read
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from stainnorm_transform import NormalizeStain, TrainConfig, weights
from stainnorm_transform.color import shift_ab

FOLDERS = ("camelyon17/*", "camelyon16/*/*", "monuseg/images")
WHITE = 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser, needed=("camelyon17", "camelyon16", "monuseg/images"))
    parser.add_argument("--weights", default=weights.DEFAULT, help="name or path (default: %(default)s)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth image (default: all)")
    options = parser.parse_args()
    normalize = NormalizeStain.pretrained(options.weights)
    paths = find(options.data)[:: options.every]
    moves: dict[str, list[float]] = {name: [] for name in MOVES}
    for path in tqdm(paths, unit="image"):
        image = tile(path)
        if normalize.estimate_offset(image).any():
            for name, move in MOVES.items():
                moves[name].extend(move(normalize, image))
    print(f"{len(paths)} images\n\n| change | n | median | 90 % | 99 % | max |\n| --- | --- | --- | --- | --- | --- |")
    for name, values in moves.items():
        print(
            f"| {name} | {len(values)} | "
            + " | ".join(f"{q:.2f}" for q in np.quantile(values, (0.5, 0.9, 0.99, 1)))
            + " |"
        )


def find(data: Path) -> list[Path]:
    return [path for folder in FOLDERS for path in sorted(data.glob(f"{folder}/*.*"))]


def tile(path: Path) -> Tensor:
    """At most 1024 pixels a side, even sides."""
    image = read(path)
    return image[:, : min(1024, image.shape[-2] // 2 * 2), : min(1024, image.shape[-1] // 2 * 2)]


def _against(*changes: Callable[[Tensor], Tensor]) -> Callable[[NormalizeStain, Tensor], Iterator[float]]:
    def move(normalize: NormalizeStain, image: Tensor) -> Iterator[float]:
        before = normalize.estimate_offset(image)
        for change in changes:
            yield float((normalize.estimate_offset(change(image)) - before).norm())

    return move


def _jpeg(image: Tensor) -> Tensor:
    file = io.BytesIO()
    to_pil_image(image).save(file, "JPEG", quality=75)
    return pil_to_tensor(Image.open(file))


def _half_size(image: Tensor) -> Tensor:
    return F.avg_pool2d(image[None] / 255, 2)[0].mul(255).round().byte()


def _white_half(normalize: NormalizeStain, image: Tensor) -> Iterator[float]:
    half = image[..., : image.shape[-1] // 2]
    white = torch.cat([half, torch.full_like(half, WHITE)], dim=-1)
    before, after = normalize.estimate_offset(half), normalize.estimate_offset(white)
    if before.any() and after.any():
        yield float((after - before).norm())


def _twice(normalize: NormalizeStain, image: Tensor) -> Iterator[float]:
    yield float(normalize.estimate_offset(normalize(image)).norm())


def known_shift(normalize: NormalizeStain, image: Tensor, shift: Tensor) -> float:
    """Error of the estimate after a shift (da, db), which is taken in float64 and not rounded."""
    before, after = (normalize.estimate_offset(each)[1:] for each in (image, shift_ab(image.double() / 255, shift)))
    return float((after - before - shift).norm())


def _known_shifts(normalize: NormalizeStain, image: Tensor) -> Iterator[float]:
    here = normalize.estimate_offset(image)[1:]
    for shift in torch.tensor([[10.0, 10.0], [-10.0, 10.0], [10.0, -10.0], [-10.0, -10.0]]):
        if (here + shift).abs().max() <= TrainConfig.max_offset / 2:
            yield known_shift(normalize, image, shift)


MOVES: dict[str, Callable[[NormalizeStain, Tensor], Iterator[float]]] = {
    "flipped": _against(lambda image: image.flip(-1), lambda image: image.flip(-2)),
    "turned by 90, 180, 270 degrees": _against(*(lambda image, k=k: image.rot90(k, (-2, -1)) for k in (1, 2, 3))),
    "as JPEG of quality 75": _against(_jpeg),
    "one half, and with as much white beside it": _white_half,
    "in a white frame of twice the side": _against(
        lambda image: F.pad(image, (image.shape[-1] // 2,) * 2 + (image.shape[-2] // 2,) * 2, value=WHITE)
    ),
    "at half the size": _against(_half_size),
    "normalized before": _twice,
    "a*, b* shifted by 10 each: error": _known_shifts,
}


if __name__ == "__main__":
    main()
