"""The command ``stainnorm train``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from stainnorm_transform import weights
from stainnorm_transform.cli.options import add_device, add_inputs, path_name
from stainnorm_transform.estimate import has_tissue, small_copy
from stainnorm_transform.files import printable
from stainnorm_transform.folders.plan import find
from stainnorm_transform.folders.targets import SLIDE_TILES, TargetImages
from stainnorm_transform.resources import choose_device
from stainnorm_transform.slides import formats, is_slide
from stainnorm_transform.training import Report, TrainConfig, error_metrics, offset_errors, print_measured, train
from stainnorm_transform.training.distributed import rank_and_count

# Without --held-out, one file in this many is held out, and at most about this many images.
HELD_OUT_EVERY, HELD_OUT_MOST = 5, 50
NAMED = 10
BAR = "{n}/{total} |{bar}| {remaining} left{postfix}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command, and its description."""
    parser.description = (
        "Trains weights whose target is the color of the given H&E images (PNG, JPEG, TIFF, BMP, WebP, JPEG 2000; "
        "tiles or large fields) and slides: a hundred tiles from ten or more slides of one lab are a good start. Of a "
        f"slide up to {SLIDE_TILES} tiles are taken, spread evenly over its tissue, 128 micrometers a side, at full "
        "resolution. Needs no labels and no other lab's images."
    )
    parser.epilog = (
        "The state of the run is kept in NAME.checkpoint.safetensors until it is done; --resume goes on from there. "
        "Files that cannot be used are named and left out. On several devices: torchrun --nproc-per-node COUNT "
        "--no-python stainnorm train ..."
    )
    add_inputs(parser, "image, slide")
    parser.add_argument(
        "--out",
        required=True,
        type=path_name,
        metavar="NAME.safetensors",
        help="weights file to write; an existing one is not replaced",
    )
    parser.add_argument(
        "--held-out",
        nargs="+",
        type=path_name,
        metavar="INPUT",
        help="images and slides to measure the error on and not to train on, best slides of their own, or images of "
        f"such (default: one file in {HELD_OUT_EVERY}, a slide with all its tiles; about {HELD_OUT_MOST} images at "
        "most)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run, if there is one")
    add_device(parser)
    parser.add_argument(
        "--workers", type=int, default=0, metavar="COUNT", help="processes that read images (default: %(default)s)"
    )
    settings = parser.add_argument_group("settings, good as they are")
    for field in dataclasses.fields(TrainConfig):
        name, shown = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if isinstance(field.default, bool):
            settings.add_argument(
                name, action=argparse.BooleanOptionalAction, default=field.default, help=f"{shown} (default: yes)"
            )
        elif isinstance(field.default, tuple):
            low, high = field.default
            settings.add_argument(
                name,
                nargs=2,
                type=float,
                metavar=("LOW", "HIGH"),
                default=field.default,
                help=f"{shown} (default: {low:g} {high:g})",
            )
        else:
            settings.add_argument(
                name,
                type=type(field.default),
                metavar="N" if isinstance(field.default, int) else "X",
                default=field.default,
                help=f"{shown} (default: %(default)s)",
            )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Trains as the options say; returns the exit status."""
    settings = {field.name: getattr(options, field.name) for field in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**{**settings, "scales": tuple(settings["scales"])})
    out: Path = options.out
    checkpoint = out.with_suffix(".checkpoint.safetensors")
    weights.check_path(out)
    if not checkpoint.exists() and out.exists():
        if options.resume:
            print(f"{out} is there, and no checkpoint beside it: nothing to resume")
            return 0
        raise ValueError(f"{out} exists: choose another name, or remove it first")
    if checkpoint.exists() and not options.resume:
        raise ValueError(f"{checkpoint} is of an interrupted run: add --resume to go on, or remove it to start again")

    with _process_group(options.device) as device:
        is_first = rank_and_count()[0] == 0
        training, held_out = _split(options.inputs, options.held_out, config, is_first)
        if is_first:
            print(f"images to train on: {_count(training)}; held out: {_count(held_out)}; device: {device}", flush=True)
        with _reporting(config, is_first) as report:
            try:
                network = train(
                    training,
                    config,
                    held_out=held_out,
                    device=device,
                    workers=options.workers,
                    checkpoint=checkpoint,
                    report=report,
                )
            except KeyboardInterrupt:
                if is_first:
                    print(f"stainnorm: interrupted; add --resume to go on from {checkpoint}", file=sys.stderr)
                return 130
        if is_first:
            errors = offset_errors(network, held_out, config.preserve_white) if len(held_out) else None
            data, metrics = _metadata(training, errors)
            weights.save(network, out, config, data=data, metrics=metrics)
            checkpoint.unlink()
            print(f"\nweights: {out}")
            print(f"to use them: stainnorm normalize INPUT --weights {shlex.quote(str(out))} --out DIR\n")
            if errors is None:
                print("the error was not measured: there is only one image or slide, and no --held-out")
            else:
                _compare(out.stem, errors, held_out)
    return 0


@contextlib.contextmanager
def _process_group(device: str | None) -> Iterator[torch.device]:
    """The device of this process, within the process group if torchrun started it."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield choose_device(device)
        return
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def _split(
    inputs: Sequence[Path], held_out: Sequence[Path] | None, config: TrainConfig, show: bool
) -> tuple[Subset[Tensor], Subset[Tensor]]:
    """The images to train on and those to measure on. Images that cannot be used are named and left out."""
    apart = list(find(held_out)) if held_out else []
    kept_apart = {os.path.realpath(path) for path in apart}
    paths = [*apart, *(path for path in find(inputs) if os.path.realpath(path) not in kept_apart)]
    if any(is_slide(path) for path in paths):
        formats.packages()
    images = TargetImages()
    usable: dict[Path, list[int]] = {}
    unusable = []
    for path in tqdm(paths, desc="reading", unit="file", disable=None if show else True):
        try:
            usable[path] = images.add(path, lambda image: _check(image, config))
        except ValueError as error:
            unusable.append(f"{path}: {error}")
    if unusable and show:
        more = [f"and {len(unusable) - NAMED} more"] if len(unusable) > NAMED else []
        print(
            f"{len(unusable)} of {len(paths)} files cannot be used and are left out:",
            *map(printable, unusable[:NAMED]),
            *more,
            sep="\n  ",
            file=sys.stderr,
        )
    measured = [path for path in apart if path in usable] if apart else _hold_out(usable)
    training = [path for path in usable if path not in set(measured)]
    if not training:
        raise ValueError("no image is left to train on")
    if apart and not measured:
        raise ValueError("no held-out image is left to measure on")
    chosen = [[number for path in paths for number in usable[path]] for paths in (training, measured)]
    return Subset(images, chosen[0]), Subset(images, chosen[1])


def _hold_out(usable: Mapping[Path, Sequence[int]]) -> list[Path]:
    """The files to measure on, evenly chosen; of a slide, no tile is then trained on."""
    paths = list(usable)
    if len(paths) < 2:
        return []
    most = HELD_OUT_MOST * len(paths) // sum(map(len, usable.values()))
    count = max(1, min(len(paths) // HELD_OUT_EVERY, most))
    return [paths[(2 * number + 1) * len(paths) // (2 * count)] for number in range(count)]


def _check(image: Tensor, config: TrainConfig) -> None:
    height, width = image.shape[-2:]
    if min(height, width) < config.crop:
        raise ValueError(f"{width} x {height} pixels, smaller than a crop of {config.crop} x {config.crop}")
    if not has_tissue(small_copy(image[None])):
        raise ValueError("no tissue")


@contextlib.contextmanager
def _reporting(config: TrainConfig, show: bool) -> Iterator[Callable[[Report], None]]:
    """A progress bar in a terminal, elsewhere a line for every measurement."""
    if not show or not sys.stderr.isatty():
        yield print_measured if show else lambda report: None
        return
    with tqdm(total=config.iterations, bar_format=BAR) as bar:

        def update(report: Report) -> None:
            text = f"loss {report.loss:.1f}"
            if report.held_out_error:
                text += ", error a* {:.1f} b* {:.1f}".format(*report.held_out_error)
            bar.set_postfix_str(text, refresh=False)
            if bar.n == 0:  # A resumed run starts in the middle.
                bar.initial = bar.n = report.iteration - 1
            bar.update(report.iteration - bar.n)

        yield update


def _slides(images: Subset[Tensor]) -> int:
    return cast(TargetImages, images.dataset).slides(images.indices)


def _count(images: Subset[Tensor]) -> str:
    slides = _slides(images)
    return f"{len(images)}, of {slides} slide{'s' * (slides > 1)}" if slides else f"{len(images)}"


def _metadata(images: Subset[Tensor], errors: Tensor | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Data and metrics to save with the weights; without file names, which may hold those of patients."""
    count, slides = len(images), _slides(images)
    data = {"summary": f"{count} images", "images": count, "held_out": 0 if errors is None else len(errors)}
    if slides:
        data |= {"summary": f"{count} images, tiles of {slides} slides among them", "slides": slides}
    if errors is None:
        return data, {"summary": "held-out error not measured"}
    return data, error_metrics(errors)


def _compare(name: str, errors: Tensor, held_out: Subset[Tensor]) -> None:
    """Prints the errors of new weights beside those of the shipped ones on the same images."""
    shipped = weights.load()
    others = offset_errors(shipped.network, held_out, shipped.config["preserve_white"])
    away = others.mean(dim=(0, 1))
    rows = {name: errors, f"shipped {weights.DEFAULT}": others, "the same, its mean removed": others - away}
    width = max(map(len, rows))
    print(f"Error of the offset on the {len(held_out)} images held out, in Lab units, mean ± standard deviation:")
    print(f"  {'':{width}}  {'a*':11}  b*")
    for label, values in rows.items():
        by_image = values.abs().mean(dim=1)
        cells = [f"{mean:.2f}" for mean in by_image.mean(dim=0).tolist()]
        if len(by_image) > 1:
            cells = [f"{cell} ± {std:.2f}" for cell, std in zip(cells, by_image.std(dim=0).tolist(), strict=True)]
        print(f"  {label:{width}}  {cells[0]:11}  {cells[1]}")
    off = f"{away[0]:+.1f} in a* and {away[1]:+.1f} in b*"
    print(f"The shipped weights have another target: to them these images are {off} off.")
