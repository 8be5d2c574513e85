"""Trains weights on one center of CAMELYON17, with the held-out error from leaving out each of its images in turn.

python examples/train_camelyon17.py --center 0 --out weights/camelyon17.safetensors
"""

import argparse
import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from camelyon17 import CENTERS, add_data_option, read_center
from torch import Tensor

from stainnorm_transform import ColorNormNet, TrainConfig, train, weights
from stainnorm_transform.training import offset_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    parser.add_argument("--center", type=int, default=0, choices=CENTERS, help="target center (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=TrainConfig.iterations, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="weights file to write")
    options = parser.parse_args()

    images = read_center(options.data, options.center)
    config = TrainConfig(iterations=options.iterations)
    # One run to a core: the network is too small to be worth several threads.
    with ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        left_out = {name: pool.submit(train_without, images, name, config) for name in images}
        final = pool.submit(train_without, images, None, config)
        errors = torch.cat([offset_errors(run.result(), [images[name]]) for name, run in left_out.items()])

    a_error, b_error = errors.abs().mean(dim=(0, 1)).tolist()
    a_bias, b_bias = errors.mean(dim=1).abs().mean(dim=0).tolist()
    by_image = {
        name: [round(value, 2) for value in error]
        for name, error in zip(images, errors.abs().mean(dim=1).tolist(), strict=True)
    }
    summary = (
        f"held-out offset error a* {a_error:.2f}, b* {b_error:.2f} Lab units, {len(images)} images left out in turn"
    )
    print(
        f"{summary}\nby image: {by_image}\npart that is the same for all shifts of an image: {a_bias:.2f}, {b_bias:.2f}"
    )
    weights.save(
        final.result(),
        options.out,
        config,
        data={
            "summary": f"CAMELYON17 center {options.center}, {len(images)} images",
            "source": "CAMELYON17 (CC0 1.0)",
            "images": list(images),
        },
        metrics={
            "summary": summary,
            "held_out_error": {"a": round(a_error, 3), "b": round(b_error, 3)},
            "held_out_error_by_image": by_image,
        },
    )
    print(f"trained on all {len(images)} images: {options.out}")


def train_without(images: dict[str, Tensor], left_out: str | None, config: TrainConfig) -> ColorNormNet:
    return train(
        [image for name, image in images.items() if name != left_out],
        config,
        held_out=[images[left_out]] if left_out else [],
        report=functools.partial(print, f"[without {left_out}]" if left_out else "[all]", flush=True),
    )


if __name__ == "__main__":
    main()
