"""PerturbStain in multi-crop augmentation, as of DINO: global and local crops of one tile, each in its own color.

python examples/multi_crop.py --tile examples/tiles/lab_a/tile_1.png --local-crops 4

A call of PerturbStain draws a change for each image of a batch (N, 3, H, W), but one for all images of a sample. So it
depends on the call which crops share their color:

- one call for each crop, as here, or one for crops of a size that are stacked: each crop has its own;
- one call for a list of PIL images or ``tv_tensors.Image``: they share theirs, whatever their size;
- one call for a list of plain tensors: as in all of torchvision v2, only the first is changed. Do not.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from stainnorm_transform import NormalizeStain, PerturbStain
from stainnorm_transform.cli.options import file_name

TILES = Path(__file__).parent / "tiles"


class MultiCrop:
    """From a tile to a list of crops, float (3, H, W): two global ones, then the local ones.

    The tile is normalized as a whole, so that the estimate sees all of it and all crops start from the same colors. A
    DataLoader makes batches of the lists: a list of (N, 3, H, W).

    Args:
        normalize: None for the default weights.
        perturb: None for PerturbStain().
        local_crops: how many.
        global_size: side of global crops, which show 0.32 to 1 of the tile's area.
        local_size: side of local crops, which show 0.05 to 0.32 of it.
    """

    def __init__(
        self,
        normalize: NormalizeStain | None = None,
        perturb: PerturbStain | None = None,
        local_crops: int = 8,
        global_size: int = 224,
        local_size: int = 96,
    ) -> None:
        self.normalize = normalize or NormalizeStain.pretrained()
        perturb = perturb or PerturbStain()
        self.crops = [crop(perturb, global_size, (0.32, 1.0))] * 2
        self.crops += [crop(perturb, local_size, (0.05, 0.32))] * local_crops

    def __call__(self, image: Image.Image | Tensor) -> list[Tensor]:
        image = self.normalize(image)
        return [each(image) for each in self.crops]


def crop(perturb: PerturbStain, size: int, scale: tuple[float, float]) -> v2.Compose:
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            perturb,
            v2.RandomApply([v2.GaussianBlur(kernel_size=9, sigma=(0.1, 2.0))], p=0.5),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tile", type=file_name, default=TILES / "lab_a/tile_1.png")
    parser.add_argument("--local-crops", type=int, default=8, help="how many (default: %(default)s)")
    options = parser.parse_args()
    if options.local_crops < 0:
        parser.error(f"expected --local-crops of 0 or more, got {options.local_crops}")
    torch.manual_seed(0)
    crops = MultiCrop(local_crops=options.local_crops)(Image.open(options.tile).convert("RGB"))
    for number, each in enumerate(crops):
        color = ", ".join(f"{value:5.2f}" for value in each.mean(dim=(1, 2)).tolist())
        print(f"{'global' if number < 2 else 'local'} crop {tuple(each.shape)}: mean {color}")


if __name__ == "__main__":
    main()
