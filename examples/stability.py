"""Measures how far the estimated color map moves when an image changes in ways that should not move it.

python examples/stability.py

Reads CAMELYON17, CAMELYON16 and MoNuSeg tiles; prints how far apart in (a*, b*) the maps from before and after the
change put the colors of the tissue: root mean squares over its pixels, in Lab units. Pixels count as much as in the
estimate, dark tissue more.
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
from stainnorm_transform.color import color_terms, fade, rgb_to_lab, shift_ab
from stainnorm_transform.estimate import small_copy, tissue_weight

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
        if normalize.estimate_map(image).any():
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


class Tissue:
    """The tissue of an image, as the estimate finds it: its colors (3, H, W), and how much each of them counts."""

    def __init__(self, image: Tensor, preserve_white: bool) -> None:
        lab = rgb_to_lab(small_copy(image[None]))
        self.weight = tissue_weight(lab)[0, 0]
        self.lab = lab[0]
        self.share = fade(self.lab[:1]) if preserve_white else torch.ones_like(self.lab[:1])

    def moved(self, color_map: Tensor, by: Tensor | None = None) -> Tensor:
        """How far a map moves each pixel, (2, H, W), once all were shifted ``by`` an offset (da, db)."""
        lab = self.lab if by is None else torch.cat([self.lab[:1], self.lab[1:] + self.shifted(by)])
        return self.share * torch.einsum("ij,jyx->iyx", color_map, color_terms(lab))

    def shifted(self, offset: Tensor) -> Tensor:
        """How far an offset moves each pixel, (2, H, W)."""
        return self.share * offset[:, None, None]

    def root_mean_square(self, distance: Tensor) -> float:
        """Of distances (2, H, W)."""
        return float(((self.weight * distance.square().sum(dim=0)).sum() / self.weight.sum()).sqrt())


def _against(*changes: Callable[[Tensor], Tensor]) -> Callable[[NormalizeStain, Tensor], Iterator[float]]:
    def move(normalize: NormalizeStain, image: Tensor) -> Iterator[float]:
        tissue, before = Tissue(image, normalize.preserve_white), normalize.estimate_map(image)
        for change in changes:
            yield tissue.root_mean_square(tissue.moved(normalize.estimate_map(change(image)) - before))

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
    before, after = normalize.estimate_map(half), normalize.estimate_map(white)
    if before.any() and after.any():
        tissue = Tissue(half, normalize.preserve_white)
        yield tissue.root_mean_square(tissue.moved(after - before))


def _twice(normalize: NormalizeStain, image: Tensor) -> Iterator[float]:
    normalized = normalize(image)
    tissue = Tissue(normalized, normalize.preserve_white)
    yield tissue.root_mean_square(tissue.moved(normalize.estimate_map(normalized)))


def known_shift(normalize: NormalizeStain, image: Tensor, shift: Tensor) -> float:
    """Error of the estimate after a shift (da, db), which is taken in float64 and not rounded.

    That is how far apart the same pixels are once they are normalized: from ``image`` and from what was shifted.
    """
    shifted = shift_ab(image.double() / 255, shift, normalize.preserve_white)
    before, after = normalize.estimate_map(image), normalize.estimate_map(shifted)
    tissue = Tissue(image, normalize.preserve_white)
    return tissue.root_mean_square(tissue.moved(after, by=shift) - tissue.moved(before) - tissue.shifted(shift))


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
