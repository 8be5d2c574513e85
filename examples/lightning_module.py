"""A LightningModule whose model starts with NormalizeStain: a short fit, a checkpoint, and what it predicts again.

python examples/lightning_module.py --data examples/tiles --out lightning.ckpt
"""

import argparse
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2

from stainnorm_transform import NormalizeStain
from stainnorm_transform.cli.options import path_name

TILES = Path(__file__).parent / "tiles"


class Classifier(lightning.LightningModule):
    """Takes float images in [0, 1]. The checkpoint holds the normalizer as well."""

    def __init__(self, num_classes: int, lr: float = 3e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        imagenet = v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
        self.model = nn.Sequential(NormalizeStain.pretrained(), imagenet, resnet18(num_classes=num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def predict_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return self(batch[0]).softmax(dim=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # All parameters: the normalizer has none.
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=path_name, default=TILES, help="folder with one folder a class")
    parser.add_argument("--out", type=path_name, default="lightning.ckpt", metavar="FILE", help="checkpoint to write")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    lightning.seed_everything(0)
    to_tensor = v2.Compose([v2.Resize((128, 128)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    try:
        images = ImageFolder(options.data, to_tensor)
    except OSError as error:
        parser.error(f"expected a folder with one folder of images a class, like examples/tiles: {error}")
    module = Classifier(len(images.classes))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=options.steps, **quiet)
    # It warns of modules in eval mode: those of the normalizer, which stay so.
    trainer.fit(module, DataLoader(images, batch_size=4, shuffle=True))
    trainer.save_checkpoint(options.out)

    loaded = Classifier.load_from_checkpoint(options.out, weights_only=True)
    before, after = (torch.cat(trainer.predict(each, DataLoader(images, batch_size=4))) for each in (module, loaded))
    print(f"{options.out}: probabilities differ by at most {(before - after).abs().max():.1e} after reading it back")


if __name__ == "__main__":
    main()
