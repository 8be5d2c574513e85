"""NormalizeStain and PerturbStain for NumPy images (H, W, 3), as a function and as Albumentations transforms.

python examples/albumentations_transform.py --tile examples/tiles/lab_a/tile_1.png

Albumentations 2.0.8 seeds nothing in the workers of a data loader: all of them draw alike, and the same again in every
epoch. ``seed_worker`` ends that, for all transforms of the Compose.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import torch
from PIL import Image

from stainnorm_transform import NormalizeStain, PerturbStain, weights
from stainnorm_transform.cli.options import file_name

TILES = Path(__file__).parent / "tiles"


def on_array(transform: NormalizeStain | PerturbStain, image: np.ndarray) -> np.ndarray:
    """RGB (H, W, 3), uint8 or float in [0, 1], to the same."""
    # A copy, as torch takes no arrays that are flipped, and warns of those that are read-only.
    tensor = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)
    return transform(tensor).permute(1, 2, 0).numpy()


class Stain(A.ImageOnlyTransform):
    """NormalizeStain. Belongs first in a Compose: before crops, to see the whole tile, and before A.Normalize.

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
        return on_array(self.normalize, img)


class RandomStain(A.ImageOnlyTransform):
    """PerturbStain, which draws by the seed of the Compose. Belongs after Stain and before A.Normalize.

    Images of one call, such as ``images`` or those of ``additional_targets``, share their change of color.

    Args:
        max_offset: as for PerturbStain.
        preserve_white: whether white glass and black keep their color.
        p: share of the images.
    """

    class InitSchema(A.ImageOnlyTransform.InitSchema):
        """Arguments that Albumentations checks."""

        max_offset: float
        preserve_white: bool

    def __init__(self, max_offset: float = 25.0, preserve_white: bool = True, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.max_offset, self.preserve_white = max_offset, preserve_white
        self.perturb = PerturbStain(max_offset, preserve_white)

    def get_params(self) -> dict[str, int]:
        return {"torch_seed": self.py_random.getrandbits(63)}

    def apply(self, img: np.ndarray, torch_seed: int, **params: Any) -> np.ndarray:
        # PerturbStain draws from torch's generator for the CPU, which is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch_seed)
            return on_array(self.perturb, img)


def seed_worker(worker: int) -> None:
    """The ``worker_init_fn`` of a DataLoader whose dataset has a Compose as ``transform``.

    Each worker gets a seed of its own, another one in each epoch, by the ``generator`` of the DataLoader or by
    ``torch.manual_seed``. The seed of the Compose is replaced.
    """
    info = torch.utils.data.get_worker_info()
    # One state for all transforms: by ``set_random_seed`` or ``A.Compose(seed=...)`` each gets a copy of its own, by
    # which two flips with p=0.5 always happen together.
    info.dataset.transform.set_random_state(np.random.default_rng(info.seed), random.Random(info.seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tile", type=file_name, default=TILES / "lab_a/tile_1.png")
    options = parser.parse_args()
    image = np.array(Image.open(options.tile).convert("RGB"))
    mask = (image.mean(axis=2) < 128).astype(np.uint8)
    print(f"image {image.shape} {image.dtype}: mean RGB {image.mean((0, 1)).round(1)}")
    for name, transform in (
        ("normalized", A.Compose([Stain(), A.HorizontalFlip(p=1)])),
        ("and perturbed", A.Compose([Stain(), RandomStain(), A.HorizontalFlip(p=1)], seed=0)),
    ):
        out = transform(image=image, mask=mask)
        print(f"{name}: mean RGB {out['image'].mean((0, 1)).round(1)}")
        print(f"mask flipped, else as it was: {np.array_equal(out['mask'], mask[:, ::-1])}")


if __name__ == "__main__":
    main()
