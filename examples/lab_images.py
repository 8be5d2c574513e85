"""Finds and reads labeled images of several labs, and splits those of a lab by slide, for classify_labs.py."""

import csv
import dataclasses
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, resize

from stainnorm_transform.resources import cores, in_order

SUFFIXES = (".png", ".jpg", ".jpeg")
SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation"}
SPLITS |= {"test": "test", "testing": "test"}
# SLIDE_x12_y34, SLIDE_x_12_y_34 and SLIDE_12_34: a slide, and where on it the image lies.
PLACE = re.compile(r"(.+?)_(?:x_?)?\d+_(?:y_?)?\d+")
FOLDS = 4  # of which one is held out
CHUNK = 64  # images worked on at a time
Change = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Labeled:
    """An image: its label is 1 for the second of the two labels; slide and split are None where they are not known."""

    path: Path
    lab: str
    label: int
    slide: str | None = None
    split: str | None = None

    @property
    def unit(self) -> str:
        """What is drawn, and kept together: its slide or, where that is not known, the image itself."""
        return f"{self.lab}/{self.slide}" if self.slide else str(self.path)


def find_images(folders: Sequence[Path], labels: Sequence[str], limit: int | None = None) -> list[Labeled]:
    """The images of all folders, in the order of their paths; at most ``limit``, drawn at random, of a lab and label.

    Raises:
        ValueError: there are not two labs, each with enough images of both labels.
    """
    found: list[Labeled] = []
    for folder in folders:
        found += of_wilds(folder) if (folder / "metadata.csv").is_file() else of_folders(folder, labels)
    found.sort(key=lambda each: str(each.path))
    counts = Counter((each.lab, each.label) for each in found)
    labs = sorted({each.lab for each in found})
    layouts = "LAB/LABEL/*.png, LAB/SPLIT/LABEL/*.png, or CAMELYON17-WILDS with its metadata.csv"
    if len(labs) < 2:
        raise ValueError(
            f"expected images of two labs or more, got {', '.join(labs) or 'none'} in {', '.join(map(str, folders))}: "
            f"give folders that hold {layouts}, whose labels are {' and '.join(labels)} (--labels)"
        )
    for lab in labs:
        for number, label in enumerate(labels):
            if counts[lab, number] < 2 * FOLDS:
                raise ValueError(
                    f"expected at least {2 * FOLDS} images of each label in each lab, got {counts[lab, number]} of "
                    f"{label!r} in {lab}: give more images, or leave this lab out"
                )
    return found if limit is None else draw(found, limit)


def draw(images: Sequence[Labeled], limit: int, seed: int = 0) -> list[Labeled]:
    """At most ``limit`` of each lab and label."""
    order = np.random.default_rng(seed).permutation(len(images))
    seen: Counter[tuple[str, int]] = Counter()
    kept = []
    for number in order:
        key = (images[number].lab, images[number].label)
        seen[key] += 1
        if seen[key] <= limit:
            kept.append(int(number))
    return [images[number] for number in sorted(kept)]


def of_folders(folder: Path, labels: Sequence[str]) -> Iterator[Labeled]:
    """LAB/LABEL and LAB/SPLIT/LABEL; folders of other labels are left out."""
    for path in sorted(folder.glob("*/*/*")):
        if path.suffix.lower() in SUFFIXES and path.parent.name in labels:
            yield _labeled(path, path.parts[-3], labels)
    for path in sorted(folder.glob("*/*/*/*")):
        if path.suffix.lower() in SUFFIXES and path.parent.name in labels:
            split = path.parts[-3]
            if split not in SPLITS:
                raise ValueError(f"expected a split named train, validation or test, got {str(path.parent.parent)!r}")
            yield _labeled(path, path.parts[-4], labels, SPLITS[split])


def _labeled(path: Path, lab: str, labels: Sequence[str], split: str | None = None) -> Labeled:
    place = PLACE.fullmatch(path.stem)
    return Labeled(path, lab, labels.index(path.parent.name), place and place[1], split)


def of_wilds(folder: Path) -> Iterator[Labeled]:
    """CAMELYON17-WILDS: its labs are center0 to center4.

    Its own split holds out patches of the same slides, so it is not used.
    """
    needed = ("patient", "node", "x_coord", "y_coord", "tumor", "slide", "center")
    with (folder / "metadata.csv").open(newline="") as file:
        rows = csv.DictReader(file)
        if absent := [name for name in needed if name not in (rows.fieldnames or ())]:
            raise ValueError(
                f"expected {folder / 'metadata.csv'} to have the columns {', '.join(needed)}, got no "
                f"{', '.join(absent)}"
            )
        for row in rows:
            place = f"patient_{int(row['patient']):03d}_node_{row['node']}"
            path = folder / "patches" / place / f"patch_{place}_x_{row['x_coord']}_y_{row['y_coord']}.png"
            yield Labeled(path, f"center{row['center']}", int(row["tumor"]), row["slide"])


def digest(images: Sequence[Labeled]) -> str:
    """Tells one set of images from another by names and sizes of files, wherever the folders lie."""
    names = (
        f"{each.lab}/{each.label}/{each.slide}/{each.split}/{each.path.name} {each.path.stat().st_size}"
        for each in images
    )
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def split_lab(images: Sequence[Labeled], lab: str, seed: int) -> dict[str, list[int]]:
    """Numbers of the images of a lab to train on, to validate by and to test on, of both labels in each.

    As the folders say or else at random: a half, a quarter and a quarter, and no slide in two parts.
    """
    rows = [number for number, image in enumerate(images) if image.lab == lab]
    given = {images[row].split for row in rows}
    if None not in given:
        parts = {part: [row for row in rows if images[row].split == part] for part in ("train", "validation", "test")}
        parts["test"] = parts["test"] or parts["validation"]
        parts["validation"] = parts["validation"] or parts["test"]
    else:
        labels, units = [images[row].label for row in rows], [images[row].unit for row in rows]
        fewest = min(len({u for u, each in zip(units, labels, strict=True) if each == label}) for label in (0, 1))
        if fewest < FOLDS:
            raise ValueError(
                f"expected at least {FOLDS} slides or images apart of each label in {lab}, got {fewest}: give more, or "
                "name the splits LAB/train and LAB/test (SLIDE_x12_y34 and SLIDE_12_34 are taken for images of a slide)"
            )
        folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(rows, labels, units)
        test, validation, *rest = ([rows[number] for number in fold] for _, fold in folds)
        parts = {"train": sorted(itertools.chain(*rest)), "validation": validation, "test": test}
    for part, members in parts.items():
        if len({images[row].label for row in members}) < 2:
            raise ValueError(
                f"expected both labels in each part of {lab}, got one in the {part} part (seed {seed}): "
                "give more slides of each label"
            )
    return parts


def read(path: Path) -> Tensor:
    """An image of mode RGB, or RGBA without transparency, as uint8 (3, H, W)."""
    try:
        with Image.open(path) as image:
            opaque = image.mode == "RGBA" and image.getchannel("A").getextrema()[0] == 255
            if image.mode != "RGB" and not opaque:
                raise ValueError(f"expected images of mode RGB, got {image.mode} in {path}: convert it, or take it out")
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(
            f"expected an image that can be read, got {path} ({error}): copy it again, or take it out"
        ) from error


class Data:
    """Images after a change of their colors, (3, side, side) in uint8 on a device: the middle square, resized.

    They are kept where all take less than ``memory`` bytes, else read anew whenever they are asked for.

    Args:
        paths: image files.
        change: gets images (N, 3, H, W) and their numbers (N,), and returns as many.
        side: in pixels.
        device: where to compute.
        memory: in bytes.
    """

    def __init__(self, paths: Sequence[Path], change: Change, side: int, device: torch.device, memory: int) -> None:
        self.paths, self.change, self.side, self.device = paths, change, side, device
        self.kept: Tensor | None = None
        if 3 * side**2 * len(paths) <= memory:
            self.kept = torch.cat(list(self._read(torch.arange(len(paths)).split(CHUNK))))

    def batches(self, plan: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images (N, 3, side, side) of each (N,) numbers."""
        if self.kept is None:
            yield from self._read(list(plan))
        else:
            for rows in plan:
                yield self.kept[rows.to(self.device, non_blocking=True)]

    def _read(self, plan: Sequence[Tensor]) -> Iterator[Tensor]:
        files = in_order(lambda rows: [read(self.paths[row]) for row in rows.tolist()], plan, cores())
        for rows, images in zip(plan, files, strict=True):
            alike = [(torch.stack(images), rows)] if len({image.shape for image in images}) == 1 else None
            apart = alike or [(image[None], row[None]) for image, row in zip(images, rows, strict=True)]
            yield torch.cat([self._square(self.change(some.to(self.device), each)) for some, each in apart])

    def _square(self, images: Tensor) -> Tensor:
        side = min(images.shape[-2:])
        return resize(center_crop(images, [side, side]), [self.side, self.side], antialias=True)
