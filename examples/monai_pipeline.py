"""NormalizeStain in a MONAI dictionary pipeline.

python examples/monai_pipeline.py --tiles examples/tiles
"""

import argparse
from pathlib import Path

from monai.data import DataLoader, Dataset, decollate_batch
from monai.transforms import Compose, EnsureChannelFirstd, Lambdad, LoadImaged, ScaleIntensityRanged

from stainnorm_transform import NormalizeStain
from stainnorm_transform.cli.options import path_name

TILES = Path(__file__).parent / "tiles"


def pipeline(normalize: NormalizeStain | None = None) -> Compose:
    """Reads ``{"image": path}`` to a normalized MetaTensor (3, H, W) in [0, 1]."""
    return Compose(
        [
            # By default MONAI reads images transposed, (W, H), and always as floats in [0, 255], which NormalizeStain
            # would take for white glass.
            LoadImaged("image", reader="PILReader", reverse_indexing=False),
            EnsureChannelFirstd("image"),
            ScaleIntensityRanged("image", a_min=0, a_max=255, b_min=0, b_max=1),
            Lambdad("image", func=normalize or NormalizeStain.pretrained()),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=path_name, default=TILES, help="folder of PNG tiles, with its subfolders")
    options = parser.parse_args()
    files = [{"image": path} for path in sorted(options.tiles.rglob("*.png"))]
    if not files:
        parser.error(f"expected a folder of PNG tiles, like examples/tiles, got {options.tiles}")
    for batch in DataLoader(Dataset(files, pipeline()), batch_size=4):
        for sample in decollate_batch(batch):
            image = sample["image"]
            color = ", ".join(f"{value:.2f}" for value in image.mean(dim=(1, 2)).tolist())
            print(f"{image.meta['filename_or_obj']}: {type(image).__name__} {tuple(image.shape)}, mean RGB {color}")


if __name__ == "__main__":
    main()
