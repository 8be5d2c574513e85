"""NormalizeStain and PerturbStain in MONAI dictionary pipelines.

python examples/monai_pipeline.py --tiles examples/tiles

PerturbStain in a Lambdad would draw from torch's generator, whatever ``Compose.set_random_state`` says, and a
CacheDataset would keep the first color of an image for all epochs. MONAI knows that RandPerturbStain and
RandPerturbStaind are random, and seeds them.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import DataLoader, Dataset, decollate_batch
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Lambdad,
    LoadImaged,
    MapTransform,
    RandFlipd,
    Randomizable,
    RandomizableTransform,
    ScaleIntensityRanged,
)
from monai.utils import MAX_SEED
from torch import Tensor

from stainnorm_transform import NormalizeStain, PerturbStain
from stainnorm_transform.cli.options import path_name

TILES = Path(__file__).parent / "tiles"


class RandPerturbStain(RandomizableTransform):
    """PerturbStain for tensors and MetaTensors (..., 3, H, W), which draws by MONAI's random state.

    Args:
        perturb: what to do.
        prob: share of the images.
    """

    def __init__(self, perturb: PerturbStain, prob: float = 1.0) -> None:
        super().__init__(prob)
        self.perturb = perturb
        self.torch_seed = 0

    def randomize(self, data: Any = None) -> None:
        super().randomize(data)
        self.torch_seed = int(self.R.randint(MAX_SEED, dtype="uint32"))

    def __call__(self, img: Tensor, randomize: bool = True) -> Tensor:
        if randomize:
            self.randomize()
        if not self._do_transform:
            return img
        # PerturbStain draws from torch's generator for the CPU, which is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.torch_seed)
            return self.perturb(img)


class RandPerturbStaind(Randomizable, MapTransform):
    """RandPerturbStain for dictionaries; the images of one dictionary share their change of color."""

    def __init__(
        self, keys: KeysCollection, perturb: PerturbStain, prob: float = 1.0, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.perturb = RandPerturbStain(perturb, prob)

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> "RandPerturbStaind":
        self.perturb.set_random_state(seed, state)
        return self

    def randomize(self, data: Any = None) -> None:
        self.perturb.randomize(data)

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        self.randomize()
        return {**data, **{key: self.perturb(data[key], randomize=False) for key in self.key_iterator(data)}}


def for_inference(normalize: NormalizeStain | None = None) -> Compose:
    """Reads ``{"image": path}`` to a normalized MetaTensor (3, H, W) in [0, 1], and a "mask" to (1, H, W)."""
    keys = ["image", "mask"]
    return Compose(
        [
            # By default MONAI reads images transposed, (W, H), and always as floats in [0, 255], which NormalizeStain
            # would take for white glass.
            LoadImaged(keys, reader="PILReader", reverse_indexing=False, allow_missing_keys=True),
            EnsureChannelFirstd(keys, allow_missing_keys=True),
            ScaleIntensityRanged("image", a_min=0, a_max=255, b_min=0, b_max=1),
            Lambdad("image", func=normalize or NormalizeStain.pretrained()),
        ]
    )


def for_training(normalize: NormalizeStain | None = None, perturb: PerturbStain | None = None) -> Compose:
    """As ``for_inference``, then changes the colors of the image and flips it, and the mask with it."""
    keys = ["image", "mask"]
    return Compose(
        [
            *for_inference(normalize).transforms,
            RandPerturbStaind("image", perturb or PerturbStain()),
            RandFlipd(keys, prob=0.5, spatial_axis=0, allow_missing_keys=True),
            RandFlipd(keys, prob=0.5, spatial_axis=1, allow_missing_keys=True),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=path_name, default=TILES, help="folder of PNG tiles, with its subfolders")
    options = parser.parse_args()
    files = [{"image": path} for path in sorted(options.tiles.rglob("*.png"))]
    if not files:
        parser.error(f"expected a folder of PNG tiles, like examples/tiles, got {options.tiles}")
    for name, pipeline in (("for inference", for_inference()), ("for training", for_training())):
        print(f"{name}:")
        # MONAI's own loader seeds every worker; by torch's all workers would draw alike.
        for batch in DataLoader(Dataset(files, pipeline), batch_size=4):
            for sample in decollate_batch(batch):
                image = sample["image"]
                color = ", ".join(f"{value:.2f}" for value in image.mean(dim=(1, 2)).tolist())
                print(f"{image.meta['filename_or_obj']}: {type(image).__name__} {tuple(image.shape)}, mean RGB {color}")


if __name__ == "__main__":
    main()
