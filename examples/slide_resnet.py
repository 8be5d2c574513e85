"""Runs a ResNet-50 over the tissue of a slide, in the colors of the target: nothing is written.

pip install ".[slides]" && python examples/slide_resnet.py slide.svs
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import resnet50
from torchvision.transforms import v2

from stainnorm_transform import NormalizeStain
from stainnorm_transform.cli.options import file_name
from stainnorm_transform.slides import SlideTiles


@torch.inference_mode()
def predict(path: Path, model: nn.Module, device: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The corners (x, y) of tiles in pixels of level 0, and the logits of each, batch by batch."""
    tiles = SlideTiles(path, NormalizeStain.pretrained(), side=224, mpp=0.5)  # level=0 where there is no resolution
    imagenet = v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    model = nn.Sequential(imagenet, model).to(device).eval()
    for batch in DataLoader(tiles, batch_size=32, num_workers=2):
        yield batch["x"], batch["y"], model(batch["image"].to(device) / 255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "slide", type=file_name, help="https://openslide.cs.cmu.edu/download/openslide-testdata has some"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model = resnet50(num_classes=2)  # load your weights here
    try:
        for x, y, logits in predict(options.slide, model, options.device):
            for row in zip(x.tolist(), y.tolist(), logits.softmax(dim=1)[:, 1].tolist(), strict=True):
                print("x = {}, y = {}: {:.3f}".format(*row))
    except ValueError as error:
        parser.error(f"{options.slide}: {error}")


if __name__ == "__main__":
    main()
