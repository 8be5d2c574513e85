"""Renders synthetic H&E tiles in the colors of three labs.

python examples/render_tiles.py --out examples/tiles

Stains absorb light by the Beer-Lambert law, RGB = light * 10 ** -(density * stain vector). The stain vectors are
those of Ruifrok and Johnston (Anal. Quant. Cytol. Histol. 23, 2001) and of Macenko et al. (ISBI 2009).
"""

import argparse
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stainnorm_transform.cli.options import path_name


@dataclass(frozen=True)
class Lab:
    """How a lab stains and scans: stain vectors and amounts, and the color of its light."""

    hematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    amounts: tuple[float, float]  # optical density of dense hematoxylin and eosin
    light: tuple[float, float, float]  # RGB of empty glass


RUIFROK = {"hematoxylin": (0.650, 0.704, 0.286), "eosin": (0.072, 0.990, 0.105)}
MACENKO = {"hematoxylin": (0.5626, 0.7201, 0.4062), "eosin": (0.2159, 0.8012, 0.5581)}
LABS = {
    "lab_a": Lab(**RUIFROK, amounts=(0.70, 0.26), light=(0.95, 0.95, 0.95)),
    "lab_b": Lab(**MACENKO, amounts=(0.85, 0.36), light=(0.96, 0.95, 0.93)),
    "lab_c": Lab(**RUIFROK, amounts=(1.00, 0.20), light=(0.90, 0.92, 0.97)),
}


def render_tile(seed: int = 0, size: int = 128, lab: Lab = LABS["lab_a"]) -> Tensor:
    """A tile of stroma, nuclei and glass: uint8, (3, size, size)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def noise(scale: float, stretch: float = 1.0) -> Tensor:
        """Smooth noise of unit variance with details of ``scale`` pixels, longer by ``stretch`` in one direction."""
        step = 2 * scale
        grid = torch.randn(1, 1, math.ceil(size / step / stretch) + 3, math.ceil(size / step) + 3, generator=generator)
        field = F.interpolate(grid, scale_factor=(step * stretch, step), mode="bicubic")[0, 0]
        top, left = round(step * stretch), round(step)
        field = field[top : top + size, left : left + size]
        return (field - field.mean()) / field.std()

    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    angle = uniform(0, math.pi)
    waves = 6 * noise(14)
    fibers = torch.sin((x * math.cos(angle) + y * math.sin(angle)) / 2.2 + waves)
    stroma = (0.75 + 0.16 * fibers + 0.12 * noise(1.5, 2) + 0.10 * noise(9)).clamp(0.1)

    chromatin = noise(1.2)
    nuclei = torch.zeros(size, size)
    for _ in range(size * size // 260):
        center_x, center_y, turn = uniform(0, size), uniform(0, size), uniform(0, math.pi)
        long, short = uniform(3.0, 5.5), uniform(2.2, 3.6)
        dx, dy = x - center_x, y - center_y
        along, across = dx * math.cos(turn) + dy * math.sin(turn), dy * math.cos(turn) - dx * math.sin(turn)
        inside = torch.sigmoid(6 * (1 - (along / long) ** 2 - (across / short) ** 2))
        nuclei = torch.maximum(nuclei, inside * uniform(0.7, 1.1))
    hematoxylin = nuclei * (1 + 0.18 * chromatin) + 0.09 * stroma
    eosin = stroma * (1 - 0.55 * nuclei)

    glass = torch.sigmoid(9 * (noise(size / 10) - 1.2))
    density = (
        torch.tensor(lab.hematoxylin)[:, None, None] * lab.amounts[0] * hematoxylin
        + torch.tensor(lab.eosin)[:, None, None] * lab.amounts[1] * eosin
    ).clamp(min=0) * (1 - glass)
    image = torch.tensor(lab.light)[:, None, None] * 10**-density + 0.004 * torch.randn(
        3, size, size, generator=generator
    )
    return (255 * image.clamp(0, 1)).round().to(torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=path_name, required=True, help="folder to write to")
    options = parser.parse_args()
    for number, (name, lab) in enumerate(LABS.items()):
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for tile in range(2):
            pixels = render_tile(10 * number + tile, 256, lab).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / f"tile_{tile + 1}.png")


if __name__ == "__main__":
    main()
