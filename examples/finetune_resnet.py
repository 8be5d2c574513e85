"""Fine-tunes a torchvision ResNet with NormalizeStain as its first layer, on a folder with one folder a class.

python examples/finetune_resnet.py --data examples/tiles --out resnet.safetensors
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.transforms import v2

from stainnorm_transform import NormalizeStain
from stainnorm_transform.cli.options import path_name

TILES = Path(__file__).parent / "tiles"


def build(num_classes: int, pretrained: bool = False) -> nn.Sequential:
    """Takes float images in [0, 1]: no mean and std before it."""
    imagenet = v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    resnet = resnet18(weights=ResNet18_Weights.DEFAULT if pretrained else None)
    resnet.fc = nn.Linear(resnet.fc.in_features, num_classes)
    return nn.Sequential(NormalizeStain.pretrained(), imagenet, resnet)


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader) -> None:
    model.train()
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    return torch.cat([model(images).argmax(1) == labels for images, labels in loader]).float().mean().item()


def save(model: nn.Module, classes: list[str], path: Path) -> None:
    """The file holds the normalizer as well: images are later treated as they were in training."""
    save_file(model.state_dict(), path, metadata={"classes": json.dumps(classes)})


def load(path: Path) -> tuple[nn.Sequential, list[str]]:
    with safe_open(path, "pt") as file:
        classes = json.loads(file.metadata()["classes"])
    model = build(len(classes))
    model.load_state_dict(load_file(path))
    return model.eval(), classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=path_name, default=TILES, help="folder with one folder a class")
    parser.add_argument("--out", type=path_name, metavar="FILE", help="checkpoint to write, .safetensors")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--size", type=int, default=128, help="side of the images (default: %(default)s)")
    parser.add_argument("--pretrained", action="store_true", help="start from ImageNet weights, which are downloaded")
    options = parser.parse_args()
    torch.manual_seed(0)
    to_tensor = v2.Compose([v2.Resize((options.size,) * 2), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    try:
        images = ImageFolder(options.data, to_tensor)
    except OSError as error:
        parser.error(f"expected a folder with one folder of images a class, like examples/tiles: {error}")
    # At random, as nothing is known of slides; otherwise each slide belongs on one side.
    train, held_out = random_split(images, [2 / 3, 1 / 3])
    train_loader, held_out_loader = DataLoader(train, 16, shuffle=True), DataLoader(held_out, 16)
    model = build(len(images.classes), options.pretrained)
    # All parameters: the normalizer has none.
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    largest = torch.tensor([images.targets[index] for index in held_out.indices]).bincount().max()
    print(f"{len(train)} images to train on, {len(held_out)} held out, at most {largest} of them of one class")
    for epoch in range(1, options.epochs + 1):
        train_epoch(model, optimizer, train_loader)
        print(f"epoch {epoch}: held-out accuracy {accuracy(model, held_out_loader):.3f}")
    if options.out:
        save(model, images.classes, options.out)
        print(f"{options.out}, read back: held-out accuracy {accuracy(load(options.out)[0], held_out_loader):.3f}")


if __name__ == "__main__":
    main()
