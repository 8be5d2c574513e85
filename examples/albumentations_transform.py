"""NormalizeStain for NumPy images (H, W, 3), as a function and as an Albumentations transform.

python examples/albumentations_transform.py --tile examples/tiles/lab_a/tile_1.png
"""

import argparse
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import torch
from PIL import Image

from stainnorm_transform import NormalizeStain, weights
from stainnorm_transform.cli.options import file_name

TILES = Path(__file__).parent / "tiles"


def normalize_array(normalize: NormalizeStain, image: np.ndarray) -> np.ndarray:
    """RGB (H, W, 3), uint8 or float in [0, 1], to the same."""
    # A copy, as torch takes no arrays that are flipped, and warns of those that are read-only.
    tensor = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)
    return normalize(tensor).permute(1, 2, 0).numpy()


class Stain(A.ImageOnlyTransform):
    """Belongs first in a Compose: before crops, to see the whole tile, and before A.Normalize.

    Args:
        weights: name or path.
        p: share of the images, 1 unless as augmentation.
    """

    class InitSchema(A.ImageOnlyTransform.InitSchema):
        """Arguments that Albumentations checks."""

        weights: str

    def __init__(self, weights: str = weights.DEFAULT, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.weights = weights
        self.normalize = NormalizeStain.pretrained(weights)

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        return normalize_array(self.normalize, img)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tile", type=file_name, default=TILES / "lab_a/tile_1.png")
    options = parser.parse_args()
    image = np.array(Image.open(options.tile).convert("RGB"))
    mask = (image.mean(axis=2) < 128).astype(np.uint8)
    transform = A.Compose([Stain(), A.HorizontalFlip(p=1)])
    out = transform(image=image, mask=mask)
    before, after = (each.mean((0, 1)).round(1) for each in (image, out["image"]))
    print(f"image {out['image'].shape} {out['image'].dtype}: mean RGB {before} before, {after} after")
    print(f"mask flipped, else as it was: {np.array_equal(out['mask'], mask[:, ::-1])}")


if __name__ == "__main__":
    main()
