"""Trains the shipped weights: a target for each center of CAMELYON17, and one by the paper's recipe.

python examples/train_camelyon17.py --out retrained

Each network is trained on all images of its center. How wrong it is on images it has not seen is measured on networks
trained without them: two of the six images are left out at a time, three for the paper's recipe.
"""

import argparse
import dataclasses
import functools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from camelyon17 import CENTERS, add_data_option, missing, read, read_center
from torch import Tensor

from stainnorm_transform import ColorNormNet, TrainConfig, train, weights
from stainnorm_transform.cli.options import path_name
from stainnorm_transform.training import error_metrics, offset_errors


@dataclass(frozen=True)
class Recipe:
    """What a target is trained on and how."""

    center: int
    config: TrainConfig
    folds: int


PAPER = TrainConfig(
    preserve_white=False,
    slope=0,
    contrast_jitter=0,
    darkness_jitter=0,
    batch_size=128,
    learning_rate=0.001,
    iterations=800,
)
RECIPES = {f"camelyon17-center{center}": Recipe(center, TrainConfig(), folds=3) for center in CENTERS}
RECIPES["camelyon17-paper"] = Recipe(0, PAPER, folds=2)
# The labs of CAMELYON16 that are centers of CAMELYON17; only tiles whose names say where they come from.
CAMELYON16 = {2: "utrecht", 3: "radboud"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    parser.add_argument("--out", type=path_name, required=True, help="folder to write NAME.safetensors to")
    parser.add_argument(
        "--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME", help="(default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--folds", type=int, help="measure by this many folds; 0: not at all")
    parser.add_argument(
        "--keep-folds", type=path_name, metavar="DIR", help="folder to write the networks of the folds to"
    )
    parser.add_argument("--camelyon16", action="store_true", help="train on CAMELYON16 tiles of the same lab as well")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one core each (default: %(default)s)")
    options = parser.parse_args()
    if options.camelyon16 and (absent := missing(options.data, ["camelyon16"])):
        parser.error(absent)
    for folder in filter(None, (options.out, options.keep_folds)):
        folder.mkdir(parents=True, exist_ok=True)
    if options.folds is not None and not (options.folds == 0 or 2 <= options.folds <= 6):
        parser.error(f"expected 0 or 2 to 6 folds, got {options.folds}")

    # One run to a core: the network is too small to be worth several threads.
    with ProcessPoolExecutor(
        options.processes, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        waiting = []
        for name in options.only:
            recipe = RECIPES[name]
            images = read_center(options.data, recipe.center)
            more = read_camelyon16(options.data, recipe.center) if options.camelyon16 else []
            config = dataclasses.replace(recipe.config, seed=options.seed)
            folds = recipe.folds if options.folds is None else options.folds
            left_out = [list(images)[fold::folds] for fold in range(folds)]
            measured = [(names, pool.submit(run, name, images, more, config, names)) for names in left_out]
            waiting.append((name, images, more, config, measured, pool.submit(run, name, images, more, config, ())))
        for name, images, more, config, measured, final in waiting:
            errors: dict[str, Tensor] = {}
            for names, fold in measured:
                network, errors_of_fold = fold.result()
                errors |= errors_of_fold
                if options.keep_folds:
                    weights.save(network, options.keep_folds / fold_name(name, names), config)
            metrics = summarize(errors) if errors else {}
            data = {
                "summary": f"CAMELYON17 center {RECIPES[name].center}, {len(images)} images",
                "source": "CAMELYON17 (CC0 1.0)",
                "images": list(images),
            }
            if more:
                data["summary"] += f", and {len(more)} CAMELYON16 tiles"
                data["source"] = "CAMELYON17 and CAMELYON16 (CC0 1.0)"
            network, _ = final.result()
            weights.save(network, options.out / f"{name}.safetensors", config, data=data, metrics=metrics)
            print(f"{name}: {metrics.get('summary', 'not measured')}", flush=True)


def run(
    name: str, images: dict[str, Tensor], more: list[Tensor], config: TrainConfig, left_out: Sequence[str]
) -> tuple[ColorNormNet, dict[str, Tensor]]:
    """The network trained without some images, and its errors (shifts, 2) on each of these."""
    label = f"[{name} without {', '.join(left_out)}]" if left_out else f"[{name}]"
    network = train(
        [image for name, image in images.items() if name not in left_out] + more,
        config,
        held_out=[images[name] for name in left_out],
        report=functools.partial(report, label),
    )
    errors = offset_errors(network, [images[name] for name in left_out], config.preserve_white) if left_out else []
    return network, dict(zip(left_out, errors, strict=True))


def fold_name(name: str, left_out: Sequence[str]) -> str:
    return f"{name}.without-{'-'.join(Path(image).stem for image in left_out)}.safetensors"


def left_out_of(path: Path) -> list[str]:
    """The names, less their suffixes, of the images that were left out, from what ``fold_name`` returned."""
    return path.stem.partition(".without-")[2].split("-")


def report(label: str, report: Any) -> None:
    if report.measured and report.iteration % 400 == 0:
        print(label, report, flush=True)


def summarize(errors: dict[str, Tensor]) -> dict[str, Any]:
    """Figures for the metadata from the errors of each image."""
    by_shift = torch.stack(list(errors.values()))
    by_image = by_shift.abs().mean(dim=1)
    a_spread, b_spread = by_image.std(dim=0).tolist()
    a_bias, b_bias = by_shift.mean(dim=1).abs().mean(dim=0).tolist()
    return {
        **error_metrics(by_shift),
        "held_out_error_std_over_images": {"a": round(a_spread, 3), "b": round(b_spread, 3)},
        "held_out_error_same_for_all_shifts": {"a": round(a_bias, 3), "b": round(b_bias, 3)},
        "held_out_error_by_image": {
            name: [round(value, 2) for value in error] for name, error in zip(errors, by_image.tolist(), strict=True)
        },
    }


def read_camelyon16(data: Path, center: int) -> list[Tensor]:
    if center not in CAMELYON16:
        return []
    folder = data / "camelyon16" / CAMELYON16[center]
    return [read(path) for path in sorted(folder.rglob("tumor_*.*"))]


if __name__ == "__main__":
    main()
