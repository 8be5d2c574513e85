"""NormalizeStain and PerturbStain in kornia's containers: normalized images, and augmentation with masks and boxes.

python examples/kornia_pipeline.py --tiles examples/tiles

To kornia they are modules without parameters: only the image is changed, and masks, boxes, keypoints and labels pass.
So kornia's ``same_on_batch`` does not reach PerturbStain, and calling a container again with ``params`` draws new
colors. ``inverse`` undoes the geometry and leaves the colors.
"""

import argparse
from pathlib import Path

import kornia.augmentation as K
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from stainnorm_transform import NormalizeStain, PerturbStain
from stainnorm_transform.cli.options import path_name

TILES = Path(__file__).parent / "tiles"


def for_inference(normalize: NormalizeStain | None = None) -> K.ImageSequential:
    """Takes images (N, 3, H, W) in [0, 1]; the mean and standard deviation of ImageNet come last."""
    imagenet = K.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    return K.ImageSequential(normalize or NormalizeStain.pretrained(), imagenet)


def for_training(
    normalize: NormalizeStain | None = None, perturb: PerturbStain | None = None
) -> K.AugmentationSequential:
    """Takes images, masks (N, 1, H, W) and boxes (N, B, 4), which flip with the images."""
    return K.AugmentationSequential(
        normalize or NormalizeStain.pretrained(),
        perturb or PerturbStain(),
        K.RandomHorizontalFlip(p=0.5),
        K.RandomVerticalFlip(p=0.5),
        data_keys=["input", "mask", "bbox_xyxy"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=path_name, default=TILES, help="folder of PNG tiles, with its subfolders")
    options = parser.parse_args()
    paths = sorted(options.tiles.rglob("*.png"))
    if not paths:
        parser.error(f"expected a folder of PNG tiles of one size, like examples/tiles, got {options.tiles}")
    images = torch.stack([pil_to_tensor(Image.open(path)) for path in paths]) / 255
    masks = (images.mean(dim=1, keepdim=True) < 0.6).float()
    boxes = torch.tensor([20.0, 30.0, 120.0, 90.0]).expand(len(paths), 1, 4)

    print(f"for inference: {tuple(for_inference()(images).shape)}")
    images, masks, boxes = for_training()(images, masks, boxes)
    for path, image, mask, box in zip(paths, images, masks, boxes, strict=True):
        color = ", ".join(f"{value:.2f}" for value in image.mean(dim=(1, 2)).tolist())
        print(f"{path}: mean RGB {color}, {mask.mean():.0%} masked, box {box[0].int().tolist()}")


if __name__ == "__main__":
    main()
