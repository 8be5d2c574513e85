"""Embeds the tiles of slides by a frozen encoder, stain-normalized before its own transform: per tile and per slide.

python examples/embed_tiles.py --slides examples/tiles --out embeddings

A slide is a folder of tiles. In pipelines that read slides themselves, with ``compose`` of this file:

TRIDENT  encoder.eval_transforms = compose(normalize, encoder.eval_transforms)
CLAM     img_transforms = compose(normalize, img_transforms), after model, img_transforms = get_encoder(name)
STAMP    extractor = dataclasses.replace(extractor, transform=compose(normalize, extractor.transform), identifier=name)

TRIDENT and CLAM are given one slide at a time: per slide, compose that slide's ``normalize`` with the transform as the
encoder came with it. STAMP goes through all slides of a folder: per slide, call it once a slide. Its identifier names
the folder of the features; a new one keeps those of other colors apart.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from stainnorm_transform import NormalizeStain
from stainnorm_transform.cli.options import path_name

TILES = Path(__file__).parent / "tiles"

Transform = Callable[[Image.Image], Tensor]


def compose(normalize: NormalizeStain, transform: Transform) -> v2.Compose:
    """Per tile, or per slide with the ``normalize`` of ``for_slide``."""
    # Two mistakes: after the encoder's Normalize it is too late, as colors come out wrong and are cut to [0, 1]; and
    # floats in [0, 255] are read as white, and come back unchanged.
    return v2.Compose([normalize, transform])


def for_slide(normalize: NormalizeStain, paths: Sequence[Path], sample: int = 48) -> NormalizeStain:
    """One color map for all tiles of a slide, from a few dozen of them."""
    chosen = Random(0).sample(paths, min(sample, len(paths)))
    return normalize.for_slide(read(path) for path in chosen)


def read(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


class Tiles(Dataset[Tensor]):
    """The tiles of a slide, as the encoder takes them."""

    def __init__(self, paths: Sequence[Path], transform: Transform) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(read(self.paths[index]))


@torch.inference_mode()
def embed(encoder: nn.Module, paths: Sequence[Path], transform: Transform, workers: int = 0) -> Tensor:
    return torch.cat([encoder(batch) for batch in DataLoader(Tiles(paths, transform), 64, num_workers=workers)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=path_name, default=TILES, help="folder with one folder of tiles a slide")
    parser.add_argument("--out", type=path_name, metavar="DIR", help="folder for one .safetensors file a slide")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="name in timm (default: %(default)s)")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights, which are downloaded")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    slides = sorted(folder for folder in options.slides.glob("*") if folder.is_dir() and any(folder.iterdir()))
    if not slides:
        parser.error(f"expected a folder with one folder of tiles a slide, like examples/tiles, got {options.slides}")
    torch.manual_seed(0)
    encoder = timm.create_model(options.model, pretrained=options.pretrained, num_classes=0).eval()
    own = create_transform(**resolve_model_data_config(encoder), is_training=False)
    normalize = NormalizeStain.pretrained()
    means: dict[str, list[Tensor]] = {}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    for slide in slides:
        paths = sorted(slide.iterdir())
        transforms = {
            "as_scanned": own,
            "per_tile": compose(normalize, own),
            "per_slide": compose(for_slide(normalize, paths), own),
        }
        embeddings = {name: embed(encoder, paths, each, options.workers) for name, each in transforms.items()}
        if options.out:
            save_file(embeddings, options.out / f"{slide.name}.safetensors")
        for name, rows in embeddings.items():
            means.setdefault(name, []).append(rows.mean(dim=0))
    for name, rows in means.items():
        print(f"{name}: mean embeddings of two slides lie {F.pdist(torch.stack(rows)).mean():.2f} apart")


if __name__ == "__main__":
    main()
