"""NormalizeStain before a timm model's own mean and std, both ways: as a layer, and in the loader.

python examples/timm_model.py --model vit_tiny_patch16_224 --tiles examples/tiles
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchvision.transforms import v2

from stainnorm_transform import NormalizeStain
from stainnorm_transform.cli.options import path_name

TILES = Path(__file__).parent / "tiles"


def as_layer(model: nn.Module) -> tuple[Callable, nn.Sequential]:
    """The loader's transform, PIL to uint8, and the model for such batches, which normalizes on its device."""
    config = resolve_model_data_config(model)
    resize = create_transform(**config, is_training=False, normalize=False)
    to_float = v2.ToDtype(torch.float32, scale=True)
    layers = nn.Sequential(NormalizeStain.pretrained(), to_float, v2.Normalize(config["mean"], config["std"]), model)
    return resize, layers.eval()


def in_loader(model: nn.Module) -> tuple[Callable, nn.Module]:
    """The loader's transform, PIL to what the model takes, and the model as it is."""
    own = create_transform(**resolve_model_data_config(model), is_training=False)
    return v2.Compose([NormalizeStain.pretrained(), own]), model.eval()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="name in timm (default: %(default)s)")
    parser.add_argument("--tiles", type=path_name, default=TILES, help="folder of PNG tiles, with its subfolders")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights, which are downloaded")
    options = parser.parse_args()
    paths = sorted(options.tiles.rglob("*.png"))
    if not paths:
        parser.error(f"expected a folder of PNG tiles, like examples/tiles, got {options.tiles}")
    torch.manual_seed(0)
    model = timm.create_model(options.model, pretrained=options.pretrained, num_classes=0)
    tiles = [Image.open(path).convert("RGB") for path in paths]
    features = []
    for name, way in (("as a layer", as_layer), ("in the loader", in_loader)):
        transform, network = way(model)
        batch = torch.stack([transform(tile) for tile in tiles])
        features.append(network(batch))
        print(f"{name}: batch {tuple(batch.shape)}, {batch.dtype}; features {tuple(features[-1].shape)}")
    # Not 1: the layer sees the tile as cropped, the loader the whole one.
    print(f"cosine similarity of the two, at least: {F.cosine_similarity(*features).min():.6f}")


if __name__ == "__main__":
    main()
