"""NormalizeStain and PerturbStain among torchvision's v2 transforms, with a mask and boxes, in a data loader.

python examples/torchvision_pipeline.py --tiles examples/tiles --workers 2 --seed 0

All of them draw from torch's generator, which a DataLoader seeds for each worker, anew in each epoch: no two draw
alike. The ``generator`` of the DataLoader decides these seeds, so that a run with the same number of workers can be
repeated. Without workers the main process draws: call ``torch.manual_seed`` too.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from stainnorm_transform import NormalizeStain, PerturbStain
from stainnorm_transform.cli.options import path_name

TILES = Path(__file__).parent / "tiles"


class SanitizeBoxes(v2.SanitizeBoundingBoxes):
    """Drops boxes cut off, and their labels; it leaves masks alone, which torchvision takes for one mask a box."""

    def forward(self, sample: dict[str, Any]) -> dict[str, Any]:
        others = {name: value for name, value in sample.items() if not isinstance(value, tv_tensors.Mask)}
        return sample | super().forward(others)


def for_training(
    normalize: NormalizeStain | None = None, perturb: PerturbStain | None = None, size: int = 224
) -> v2.Compose:
    """Takes samples with a PIL image or ``tv_tensors.Image``, ``tv_tensors.Mask`` and ``BoundingBoxes``, and labels.

    Masks and boxes follow the geometry, boxes cut off go with their ``labels``, and masks keep their values.
    """
    return v2.Compose(
        [
            # First, on the whole tile.
            normalize or NormalizeStain.pretrained(),
            perturb or PerturbStain(),
            v2.RandomResizedCrop(size, scale=(0.5, 1)),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            SanitizeBoxes(),
            v2.ToImage(),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )


class Tiles(Dataset):
    """Tiles, with a mask of what is dark and one box for each: put your own in their place."""

    def __init__(self, paths: list[Path], transform: Callable) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = tv_tensors.Image(pil_to_tensor(Image.open(self.paths[index]).convert("RGB")))
        sample = {
            "image": image,
            "mask": tv_tensors.Mask(image.float().mean(dim=0) < 150),
            "boxes": tv_tensors.BoundingBoxes([[20, 30, 120, 90]], format="XYXY", canvas_size=image.shape[-2:]),
            "labels": torch.tensor([1]),
        }
        return self.transform(sample)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=path_name, default=TILES, help="folder of PNG tiles, with its subfolders")
    parser.add_argument("--workers", type=int, default=2, help="of the data loader (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides all draws (default: %(default)s)")
    options = parser.parse_args()
    paths = sorted(options.tiles.rglob("*.png"))
    if not paths:
        parser.error(f"expected a folder of PNG tiles, like examples/tiles, got {options.tiles}")
    if options.workers < 0:
        parser.error(f"expected --workers of 0 or more, got {options.workers}")
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    # As lists: each sample has as many boxes as it has.
    loader = DataLoader(
        Tiles(paths, for_training()),
        batch_size=2,
        shuffle=True,
        num_workers=options.workers,
        generator=generator,
        collate_fn=list,
    )
    for epoch in range(2):
        for batch in loader:
            for sample in batch:
                color = ", ".join(f"{value:5.2f}" for value in sample["image"].mean(dim=(1, 2)).tolist())
                boxes = sample["boxes"].int().tolist()
                print(f"epoch {epoch}: mean {color}, {sample['mask'].float().mean():.0%} masked, boxes {boxes}")


if __name__ == "__main__":
    main()
