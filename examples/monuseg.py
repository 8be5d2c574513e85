"""Reads the images of MoNuSeg with their nuclei, and scores nuclei that were found."""

import csv
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from monai.metrics import compute_dice
from PIL import Image
from torch import Tensor

from stainnorm_transform.folders.images import SUFFIXES

FOLDERS = ("monuseg/images", "monuseg/instances")
SHARES = 6  # Of the images, one in six is tested and one validates: 20, 5 and 5 of 30, as in the paper.


class Sample(NamedTuple):
    """An image (3, H, W) in uint8, and its nuclei as an instance map (H, W): 0 is background, every nucleus a number.

    The site is TCGA's tissue source site, in the name: a hospital, or one of its departments.
    """

    name: str
    organ: str
    site: str
    image: Tensor
    instances: Tensor


def read_monuseg(folder: Path, crop: int) -> list[Sample]:
    """The samples of a folder with ``images``, ``instances`` and ``organs.csv``, by name.

    Raises:
        ValueError: an image is not RGB or smaller than ``crop``; images differ in size; an instance map is missing,
            has several channels, or does not fit its image; there are fewer than six images, or no ``organs.csv``.
    """
    paths = sorted(path for path in (folder / "images").iterdir() if path.suffix.lower() in SUFFIXES)
    if len(paths) < SHARES:
        raise ValueError(
            f"expected at least {SHARES} images in {folder / 'images'} to train, validate and test on, got {len(paths)}"
        )
    organs = read_organs(folder / "organs.csv")
    samples = [read_sample(path, folder / "instances" / f"{path.stem}.png", organs) for path in paths]
    sizes = {tuple(sample.image.shape[1:]) for sample in samples}
    if len(sizes) > 1:
        found = ", ".join(f"{height} x {width}" for height, width in sorted(sizes))
        raise ValueError(f"expected images of one size in {folder / 'images'}, got {found}: crop them to one")
    if min(*sizes.pop()) < crop:
        raise ValueError(f"expected images of at least {crop} x {crop} pixels, got smaller ones in {folder / 'images'}")
    return samples


def digest(samples: list[Sample]) -> str:
    """Tells one set of samples from another, by all that they have."""
    whole = hashlib.sha256()
    for name, organ, site, image, instances in samples:
        whole.update(f"{name} {organ} {site}".encode() + image.numpy().tobytes() + instances.numpy().tobytes())
    return whole.hexdigest()[:16]


def read_organs(path: Path) -> dict[str, str]:
    """Organs by the name of the image, from columns ``id`` and ``organ``."""
    expected = f"expected {path}, a table with the columns id and organ"
    if not path.is_file():
        raise ValueError(f"{expected}, got no such file")
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        columns = table.fieldnames or []
        if not {"id", "organ"} <= set(columns):
            raise ValueError(f"{expected}, got {', '.join(columns) or 'an empty file'}")
        return {row["id"]: row["organ"].lower() for row in table}


def read_sample(path: Path, map_path: Path, organs: dict[str, str]) -> Sample:
    if not map_path.is_file():
        raise ValueError(f"expected the nuclei of {path.name} as the instance map {map_path}, got no such file")
    with Image.open(path) as file:
        if file.mode != "RGB":
            raise ValueError(f"{path}: expected an image of mode RGB, got {file.mode}: convert it")
        image = torch.from_numpy(np.array(file)).permute(2, 0, 1).contiguous()
    with Image.open(map_path) as file:
        instances = np.array(file).astype(np.int64)
    if instances.shape != image.shape[1:]:
        expected, got = (" x ".join(map(str, shape)) for shape in (image.shape[1:], instances.shape))
        raise ValueError(f"{map_path}: expected a map of {expected} pixels, one channel, as {path.name} has, got {got}")
    site = path.stem.split("-")[1] if path.stem.count("-") > 1 else "unknown"
    return Sample(path.stem, organs.get(path.stem, "unknown"), site, image, torch.from_numpy(instances))


def split(count: int, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Numbers of the images to train, validate and test on: 20, 5 and 5 of 30.

    Seeds 0 to 5 test every image once; seeds 6 to 11 do so in another order, and so on.
    """
    share = count // SHARES
    order = np.random.default_rng(seed // SHARES).permutation(count)
    order = np.roll(order, -(seed % SHARES) * share).tolist()
    return sorted(order[2 * share :]), sorted(order[share : 2 * share]), sorted(order[:share])


# --- Scores of an instance map (H, W), int64, against the true one.


def dice(found: Tensor, truth: Tensor) -> float:
    """Dice coefficient of the pixels of nuclei."""
    return float(compute_dice((found > 0)[None, None], (truth > 0)[None, None], ignore_empty=False))


class Overlaps(NamedTuple):
    """Pixels that each true nucleus shares with each one found, (true, found), and the sizes of both, in pixels."""

    shared: np.ndarray
    true: np.ndarray
    found: np.ndarray

    def union(self) -> np.ndarray:
        return self.true[:, None] + self.found - self.shared


def overlaps(found: Tensor, truth: Tensor) -> Overlaps:
    (true_names, rows), (found_names, columns) = (
        np.unique(each.cpu().numpy(), return_inverse=True) for each in (truth, found)
    )
    shape = len(true_names), len(found_names)
    table = np.bincount(rows.ravel() * shape[1] + columns.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    of_true, of_found = true_names != 0, found_names != 0
    return Overlaps(table[of_true][:, of_found], table.sum(axis=1)[of_true], table.sum(axis=0)[of_found])


def aggregated_jaccard(nuclei: Overlaps) -> float:
    """Aggregated Jaccard index, AJI, of Kumar et al. 2017 (doi 10.1109/TMI.2017.2677499); 1 where there is nothing.

    Each true nucleus takes the one found with which its Jaccard index is largest. Their intersections and unions are
    summed. True nuclei that nothing touches, and found ones that none took, are added to the unions. One that was found
    may be taken several times.
    """
    if not nuclei.shared.size:
        return float(not nuclei.true.size and not nuclei.found.size)
    union = nuclei.union()
    best = (nuclei.shared / union).argmax(axis=1)
    rows = np.arange(len(best))
    hit = nuclei.shared[rows, best] > 0
    unions = union[rows, best][hit].sum() + nuclei.true[~hit].sum() + np.delete(nuclei.found, best[hit]).sum()
    return float(nuclei.shared[rows, best].sum() / unions)


def panoptic_quality(nuclei: Overlaps) -> float:
    """Panoptic quality, PQ, of Kirillov et al. 2019 (doi 10.1109/CVPR.2019.00963), of one class; 1 if there is nothing.

    Of the same table as AJI: for one image of MoNuSeg torchmetrics takes seconds, and MONAI gigabytes.
    """
    nuclei_in_all = len(nuclei.true) + len(nuclei.found)
    if not nuclei_in_all:
        return 1.0
    jaccard = nuclei.shared / nuclei.union()
    return float(jaccard[jaccard > 0.5].sum() / (nuclei_in_all / 2))  # Over 0.5, no nucleus has two partners.
