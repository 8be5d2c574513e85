"""Does stain normalization help a classifier in a lab that it was not trained on? Trains on each lab, tests on all.

pip install -e ".[evidence]" && python examples/classify_labs.py tiles --json figures.json --plot figures.png

A folder has images as LAB/LABEL/*.png or LAB/SPLIT/LABEL/*.png (or jpg), or is CAMELYON17-WILDS; several are pooled.
For each method, training lab and seed a model is trained on images in this method's colors, or a linear probe on a
frozen encoder (--encoder), or the whole encoder (--finetune). Slides are kept together where names say them, as
SLIDE_x12_y34 does. Colors of all labs go to one target (--weights), or those of the training lab for methods that take
a reference; augmentations change training images alone. Results are written after each run. An interrupted call goes on
with --resume.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
import torch
from figures_file import check_outputs, earlier_runs, write_figures
from lab_augmentations import AUGMENTATIONS, Augment
from lab_colors import METHODS, Method, change_of, quiet, with_library
from lab_figures import Run, measure, plot, print_table
from lab_images import Data, Labeled, digest, find_images, split_lab
from lab_models import Encoder, Recipe, build, check_side, embed, fit_probe, load_encoder, logits, probability, train
from tqdm import tqdm

from stainnorm_transform import __version__, weights
from stainnorm_transform.cli.options import add_device, path_name
from stainnorm_transform.resources import choose_device, cores

SIDE = 96
STATISTICS = 256  # images of the training lab that an augmentation may look at
MEMORY = 2**31  # bytes of the images of a method that are kept
PAPER = Recipe("resnet50", steps=3000, batch=32, learning_rate=0.001, weight_decay=0.01, validated=True)
FINETUNED = Recipe("", steps=200, batch=16, learning_rate=0.0005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=path_name, metavar="FOLDER", help="images of two labs or more")
    parser.add_argument(
        "--labels", nargs=2, default=["normal", "tumor"], metavar="LABEL", help="(default: normal tumor)"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: all that are installed)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="runs with other splits and models (default: %(default)s)")
    parser.add_argument(
        "--weights", nargs="+", default=[weights.DEFAULT], metavar="[LAB=]WEIGHTS",
        help="name or file of the target, for all training labs or for one (default: camelyon17)",
    )  # fmt: skip
    parser.add_argument("--model", help="small, or a model of torchvision (default: small)")
    parser.add_argument(
        "--encoder",
        help="with a linear probe, frozen: efficientnet-lite0, a model of timm, hf-hub:NAME or local-dir:PATH",
    )
    parser.add_argument("--finetune", action="store_true", help="train all of the encoder, with a linear layer")
    parser.add_argument(
        "--paper", action="store_true",
        help="as in arXiv 2011.15000: ResNet50, batch 32, learning rate 0.001, weight decay 0.01, and the weights that "
        "did best on the validation part",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, help="batches to train on (default: 400; 3000 with --paper, 200 with --finetune)"
    )
    parser.add_argument("--batch", type=int, help="images in each (default: 32; 16 with --finetune)")
    parser.add_argument("--side", type=int, help="of the images, in pixels (default: 96, or what the encoder takes)")
    parser.add_argument("--limit", type=int, help="draw at most so many images of each lab and label")
    parser.add_argument("--json", type=path_name, help="file to write all figures to")
    parser.add_argument("--resume", action="store_true", help="leave out the runs that the file has")
    parser.add_argument("--plot", type=path_name, help="PNG file")
    add_device(parser)
    options = parser.parse_args()
    try:
        runs = evaluate(options)
    except ValueError as error:
        parser.error(str(error))
    print_table(runs)
    if options.plot:
        plot(runs, options.plot)


def evaluate(options: argparse.Namespace) -> list[Run]:
    """All runs: those that a resumed file has, and the others, done now."""
    for name in ("seeds", "steps", "batch", "side", "limit"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"expected --{name} of 1 or more, got {getattr(options, name)}")
    check_outputs(options.json, options.plot)
    if options.batch == 1:
        raise ValueError("expected --batch of 2 or more, one image of each label, got 1")
    device = choose_device(options.device)
    recipe = recipe_of(options)
    titles = titles_of(options.methods)
    images = find_images(options.folders, options.labels, options.limit)
    labs = sorted({image.lab for image in images})
    targets = targets_of(options.weights, labs)
    splits = {(lab, seed): split_lab(images, lab, seed) for lab in labs for seed in range(options.seeds)}
    encoder = load_encoder(options.encoder, options.side, device) if options.encoder else None
    side = encoder.side if encoder else options.side or SIDE
    if not encoder:
        check_side(recipe.model, side)
    model: Run = {"encoder": options.encoder, "weights": encoder.digest} if encoder else {}
    if not encoder or options.finetune:
        model |= dataclasses.asdict(recipe)
    settings = {
        "version": __version__, "images": digest(images), "labels": options.labels, "side": side, "weights": targets,
        "model": model,
    }  # fmt: skip
    runs = earlier_runs(options.json, options.resume, settings)
    done = {(run["title"], run["lab"], run["seed"]) for run in runs}
    todo = [run for run in plan(list(titles), labs, options.seeds) if (titles[run[0]], *run[1:]) not in done]
    torch.backends.cudnn.deterministic = True
    kept: tuple[object, ...] | None = None
    with pool_of(len(images)) as pool:
        for method, lab, seed in tqdm(todo, unit="run", disable=None):
            parts = splits[lab, seed]
            colors = METHODS[method].colors
            # What the colors depend on: images are changed once for all runs that share it.
            depends = (colors, targets[lab]) if colors in ("tile", "slide") else (colors, lab, seed)
            if depends != kept:
                change = change_of(colors, images, parts["train"], seed, targets[lab], device, pool)
                data = Data([image.path for image in images], change, side, device, MEMORY)
                features = embed(encoder, data) if encoder and not options.finetune else None
                kept = depends
            tests = score(METHODS[method], images, parts, lab, seed, data, encoder, features, recipe)
            runs.append({"title": titles[method], "lab": lab, "seed": seed, "tests": tests})
            if options.json:
                write_figures(options.json, settings, "runs", runs)
    return runs


def recipe_of(options: argparse.Namespace) -> Recipe:
    given = {name: getattr(options, name) for name in ("model", "steps", "batch") if getattr(options, name) is not None}
    if options.finetune:
        if not options.encoder:
            raise ValueError("expected --encoder with --finetune: what is to be trained")
        if options.paper or options.model:
            raise ValueError("expected --finetune without --paper and --model: the encoder is the model")
        return dataclasses.replace(FINETUNED, **given)
    if options.encoder and (given or options.paper):
        raise ValueError(
            "expected --encoder without --paper, --model, --steps and --batch: nothing but a probe is trained, "
            "unless there is --finetune"
        )
    recipe = dataclasses.replace(PAPER if options.paper else Recipe(), **given)
    build(recipe.model)
    return recipe


def targets_of(given: Sequence[str], labs: Sequence[str]) -> dict[str, str]:
    """The weights of each training lab, from WEIGHTS for all and LAB=WEIGHTS for one."""
    targets = dict.fromkeys(labs, weights.DEFAULT)
    for text in sorted(given, key=lambda text: "=" in text):
        lab, equals, name = text.rpartition("=") if not Path(text).is_file() else ("", "", text)
        if equals and lab not in labs:
            raise ValueError(f"expected LAB=WEIGHTS of a lab that there is, {' or '.join(labs)}, got {text!r}")
        try:
            weights.load(name)
        except OSError as error:
            raise ValueError(f"expected weights that are there, got {name!r} ({error})") from error
        targets |= {lab: name} if equals else dict.fromkeys(labs, name)
    return targets


def titles_of(methods: Sequence[str]) -> dict[str, str]:
    """The methods that can be had, and what they are called: by their library too, where they are from another."""
    titles = {}
    for method in dict.fromkeys(methods):
        title = METHODS[method].title
        try:
            titles[method] = with_library(title, METHODS[method])
        except ModuleNotFoundError as error:
            print(f"left out: {title}, because {error}", file=sys.stderr)
    if not titles:
        raise ValueError('expected a method that is installed, got none: run pip install -e ".[evidence]"')
    return titles


def plan(methods: Sequence[str], labs: Sequence[str], seeds: int) -> list[tuple[str, str, int]]:
    """(method, lab, seed): those of the same colors one after the other."""
    by_colors = sorted(methods, key=lambda method: METHODS[method].colors)
    groups = [list(group) for _, group in itertools.groupby(by_colors, key=lambda method: METHODS[method].colors)]
    return [(m, lab, seed) for lab in labs for group in groups for seed in range(seeds) for m in group]


def pool_of(images: int) -> ProcessPoolExecutor | nullcontext[None]:
    """Processes for the methods that normalize image by image; for a few images they are not worth their start."""
    if cores() == 1 or images < 500:
        return nullcontext()
    return ProcessPoolExecutor(cores(), get_context("spawn"), initializer=quiet)


def score(
    method: Method,
    images: Sequence[Labeled],
    parts: dict[str, list[int]],
    lab: str,
    seed: int,
    data: Data,
    encoder: Encoder | None,
    features: np.ndarray | None,
    recipe: Recipe,
) -> dict[str, Run]:
    """The figures by lab of a model that is trained on one: of its test part, and of all images of the others."""
    labels = torch.tensor([image.label for image in images])
    rows_of = {image.lab: [row for row, each in enumerate(images) if each.lab == image.lab] for image in images}
    rows_of[lab] = parts["test"]
    augment = augmentation_of(method, data, parts["train"], seed)
    if encoder and features is not None:
        probe = fit_probe(encoder, data, labels, parts["train"], augment, seed)
        scores = {other: probe.predict_proba(features[rows])[:, 1] for other, rows in rows_of.items()}
    else:
        model = train(data, labels, parts, augment, recipe, seed, encoder)
        prevalence = float(labels[parts["train"]].double().mean())
        scores = {other: probability(logits(model, data, rows), prevalence) for other, rows in rows_of.items()}
    return {
        other: measure(labels[rows].numpy(), scores[other], [images[row].unit for row in rows])
        for other, rows in rows_of.items()
    }


def augmentation_of(method: Method, data: Data, rows: Sequence[int], seed: int) -> Augment | None:
    if method.augmentation is None:
        return None
    chosen = torch.tensor(Random(seed).sample(sorted(rows), min(STATISTICS, len(rows))))
    (images,) = data.batches([chosen])
    return AUGMENTATIONS[method.augmentation].on_batches(images.cpu(), seed)


if __name__ == "__main__":
    main()
