"""The changes of color that classify_labs.py compares: none, ColorNormNet, a control, and other methods."""

import functools
import importlib.util
import logging
import warnings
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from lab_augmentations import AUGMENTATIONS
from lab_images import Change, Labeled, read
from peers import PEERS, mean_match, torchstain_reinhard
from torch import Tensor

from stainnorm_transform import NormalizeStain
from stainnorm_transform.color import shift_ab
from stainnorm_transform.resources import cores

NAMED = ("albumentations", "tiatoolbox", "torchstain")  # libraries that a title has
SLIDE_SAMPLE = 48  # images of a slide that its map is estimated from
REFERENCES = 16  # images of the training lab that the others take, side by side


@dataclass(frozen=True)
class Method:
    """What is done to all images, and the augmentation of those that a model is trained on."""

    title: str
    colors: str
    augmentation: str | None = None


METHODS = {
    "nothing": Method("nothing", "scanned"),
    "colornormnet": Method("ColorNormNet, a tile", "tile"),
    "colornormnet-slide": Method("ColorNormNet, one map a slide", "slide"),
    "control": Method("mean match (control)", "control"),
    "reinhard": Method("Reinhard", "reinhard"),
    "macenko": Method("Macenko", "macenko"),
    "vahadane": Method("Vahadane", "vahadane"),
    "both": Method("ColorNormNet, a tile, and PerturbStain", "tile", "perturbstain"),
    "perturbstain": Method("PerturbStain", "scanned", "perturbstain"),
    "hestain": Method("HEStain", "scanned", "hestain"),
    "randstainna": Method("RandStainNA", "scanned", "randstainna"),
    "hed-jitter": Method("HED jitter", "scanned", "hed-jitter"),
    "color-jitter": Method("ColorJitter", "scanned", "color-jitter"),
    "stain-augmentor": Method("StainAugmentor", "scanned", "stain-augmentor"),
}
# Of each, the first whose library is installed.
REFERENCED = {
    "control": [("stainnorm_transform", lambda reference: mean_match([reference]))],
    "reinhard": [PEERS["Reinhard (tiatoolbox)"], ("torchstain", torchstain_reinhard)],
    "macenko": [PEERS["Macenko (torchstain)"]],
    "vahadane": [PEERS["Vahadane (tiatoolbox)"]],
}


def with_library(title: str, method: Method) -> str:
    """A title, and the library of others that a method is from.

    Raises:
        ModuleNotFoundError: what the method needs is not installed.
    """
    found = [library_of(method.colors)] if method.colors in REFERENCED else []
    if method.augmentation:
        library = AUGMENTATIONS[method.augmentation].library
        if not importlib.util.find_spec(library):
            raise ModuleNotFoundError(f"{library} is not installed")
        found.append(library)
    named = [library for library in found if library in NAMED]
    return f"{title} ({', '.join(named)})" if named else title


def library_of(colors: str) -> str:
    """The first that is installed of the libraries that change colors like this.

    Raises:
        ModuleNotFoundError: none is installed.
    """
    libraries = [library for library, _ in REFERENCED[colors]]
    for library in libraries:
        if importlib.util.find_spec(library):
            return library
    raise ModuleNotFoundError(f"{' or '.join(libraries)} is not installed")


def change_of(
    colors: str,
    images: Sequence[Labeled],
    train_rows: Sequence[int],
    seed: int,
    weights: str,
    device: torch.device,
    pool: ProcessPoolExecutor | None,
) -> Change:
    """How the images are changed, with the training images of a lab and a seed for those that need a reference."""
    if colors == "scanned":
        return lambda batch, rows: batch
    if colors in ("tile", "slide"):
        normalize = NormalizeStain.pretrained(weights).to(device)
        return by_slide(normalize, images, device) if colors == "slide" else lambda batch, rows: normalize(batch)
    chosen = Random(seed).sample(sorted(train_rows), min(REFERENCES, len(train_rows)))
    tiles = [read(images[row].path) for row in chosen]
    height = min(tile.shape[1] for tile in tiles)
    reference = torch.cat([tile[:, :height] for tile in tiles], dim=-1).numpy()
    return functools.partial(by_reference, colors, reference, pool)


def by_slide(normalize: NormalizeStain, images: Sequence[Labeled], device: torch.device) -> Change:
    """One map for all images of a slide; one for all images of a lab whose slides are not known."""
    members: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for row, image in enumerate(images):
        members[image.lab, image.slide].append(row)
    maps = torch.zeros(len(images), 2, 4, device=device)
    for rows in members.values():
        chosen = Random(0).sample(rows, min(SLIDE_SAMPLE, len(rows)))
        maps[rows] = normalize.for_slide(read(images[row].path).to(device) for row in chosen).fixed_map
    return lambda batch, rows: shift_ab(batch, -maps[rows.to(device)], normalize.preserve_white)


def by_reference(
    colors: str, reference: np.ndarray, pool: ProcessPoolExecutor | None, batch: Tensor, rows: Tensor
) -> Tensor:
    """Each image by a method of ``REFERENCED``, in several processes if there is a pool."""
    arrays = batch.cpu().numpy()
    if pool is None:
        parts = [normalize_each(colors, reference, arrays)]
    else:
        pieces = np.array_split(arrays, min(len(arrays), cores()))
        parts = list(pool.map(normalize_each, [colors] * len(pieces), [reference] * len(pieces), pieces))
    return torch.from_numpy(np.concatenate(parts)).to(batch.device)


_fitted: dict[tuple[str, int], object] = {}


def normalize_each(colors: str, reference: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Images that cannot be normalized, such as blank ones, stay as they are."""
    key = (colors, hash(reference.tobytes()))
    if key not in _fitted:
        _fitted.clear()
        fit = dict(REFERENCED[colors])[library_of(colors)]
        _fitted[key] = fit(torch.from_numpy(reference))
    after = images.copy()
    for number, image in enumerate(images):
        np.random.seed(0)  # noqa: NPY002 - scikit-learn's dictionary learning, in tiatoolbox's Vahadane, draws from it.
        try:
            after[number] = _fitted[key](torch.from_numpy(image)).numpy()
        except Exception:  # Each library raises others.
            continue
    return after


def quiet() -> None:
    """For the processes of a pool."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
