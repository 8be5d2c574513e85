"""Trains the shipped weights on one center of CAMELYON17, with held-out errors from folds over its images.

python examples/train_camelyon17.py --center 0 --out weights/camelyon17.safetensors
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stainnorm_transform import ColorNormNet, TrainConfig, train, weights
from stainnorm_transform.training import offset_errors

FOLDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("STAINNORM_DATA", "../shared/data")),
        help="folder with camelyon17/center_0 ... center_4 (default: $STAINNORM_DATA or ../shared/data)",
    )
    parser.add_argument("--center", type=int, default=0, choices=range(5), help="target center (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=TrainConfig.iterations, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="weights file to write (default: none, only the folds are run)")
    options = parser.parse_args()

    images = read_folder(options.data / "camelyon17" / f"center_{options.center}")
    config = TrainConfig(iterations=options.iterations)
    errors = torch.cat([fold_errors(images, fold, config) for fold in range(FOLDS)])
    a_error, b_error = errors.abs().mean(dim=(0, 1)).tolist()
    a_bias, b_bias = errors.mean(dim=1).abs().mean(dim=0).tolist()
    summary = (
        f"held-out offset error a* {a_error:.2f}, b* {b_error:.2f} (mean absolute, Lab units; "
        f"{len(errors)} images in {FOLDS} folds)"
    )
    print(f"{summary}\nof which the same for every shift of an image: a* {a_bias:.2f}, b* {b_bias:.2f}")
    if options.out:
        network: ColorNormNet = train(list(images.values()), config)
        weights.save(
            network,
            options.out,
            config,
            data={
                "summary": f"CAMELYON17 center {options.center}, {len(images)} images",
                "source": "CAMELYON17 (CC0 1.0)",
                "images": sorted(images),
            },
            metrics={
                "summary": summary,
                "held_out_error": {"a": round(a_error, 3), "b": round(b_error, 3)},
                "held_out_by_image": {
                    name: [round(value, 3) for value in error.abs().mean(dim=0).tolist()]
                    for name, error in zip(fold_order(images), errors, strict=True)
                },
            },
        )
        print(f"trained on all {len(images)} images: {options.out}")


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The images of a folder by name: uint8, (3, H, W)."""
    return {
        path.name: torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        for path in sorted(folder.iterdir())
    }


def fold_order(images: dict[str, Tensor]) -> list[str]:
    names = sorted(images)
    return [name for fold in range(FOLDS) for name in names[fold::FOLDS]]


def fold_errors(images: dict[str, Tensor], fold: int, config: TrainConfig) -> Tensor:
    """Errors (images, draws, 2) on every third image after training on the others."""
    held_out = sorted(images)[fold::FOLDS]
    print(f"fold {fold + 1} of {FOLDS}, held out: {', '.join(held_out)}")
    network = train(
        [image for name, image in images.items() if name not in held_out],
        config,
        held_out=[images[name] for name in held_out],
    )
    return offset_errors(network, [images[name] for name in held_out], config.preserve_white)


if __name__ == "__main__":
    main()
