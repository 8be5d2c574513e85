"""The augmentations that classify_labs.py and benchmark.py compare: PerturbStain, and those of libraries and papers.

Where a library has a default strength, that is taken; every image is changed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from peers import to_array
from torch import Tensor
from torchvision.transforms import v2

from stainnorm_transform import PerturbStain

Augment = Callable[[Tensor], Tensor]  # images (N, 3, S, S) in [0, 1] to as many, each with a change of its own
Array = Callable[[np.ndarray], np.ndarray]  # an image (H, W, 3) in uint8 to another
HED_STRENGTH = 0.2  # factors of 1 - 0.2 to 1 + 0.2, and shifts of -0.2 to 0.2, of natural optical density
# Of arXiv 1703.02442, for the same task.
COLOR_JITTER = {"brightness": 0.25, "contrast": 0.75, "saturation": 0.25, "hue": 0.04}


@dataclass(frozen=True)
class Augmentation:
    """How one is made, from images of the training lab (N, 3, S, S) in uint8 and a seed, and what it needs."""

    library: str
    make: Callable[[Tensor, int], Augment | Array]
    of_arrays: bool = True  # whether it takes an ``Array``'s images, else those of an ``Augment``

    def on_batches(self, images: Tensor, seed: int) -> Augment:
        made = self.make(images, seed)
        return each(made) if self.of_arrays else made


def each(change: Array) -> Augment:
    """A change of one uint8 image, for batches on any device."""

    def augment(images: Tensor) -> Tensor:
        arrays = [change(to_array(image)) for image in (images * 255).round().byte().cpu()]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(images.device).float() / 255

    return augment


def perturb_stain(images: Tensor, seed: int) -> Augment:
    return PerturbStain()


def hestain(images: Tensor, seed: int) -> Array:
    """Albumentations, with one of its eight stain matrices at random."""
    import albumentations

    transform = albumentations.Compose([albumentations.HEStain(method="random_preset", p=1)], seed=seed)
    return lambda image: transform(image=image)["image"]


def randstainna(images: Tensor, seed: int) -> Array:
    """RandStainNA (arXiv 2206.12694): Reinhard to a mean and standard deviation of Lab that are drawn.

    They are normally distributed, as they are in the images of the training lab. Our code, in 8-bit Lab by OpenCV; a
    deviation below one level counts as one.
    """
    import cv2

    def to_lab(image: np.ndarray) -> np.ndarray:
        return cv2.cvtColor(image, cv2.COLOR_RGB2LAB)

    def statistics(lab: np.ndarray) -> np.ndarray:
        return np.stack([lab.mean((0, 1)), lab.std((0, 1))])

    seen = np.stack([statistics(to_lab(to_array(image))) for image in images])
    center, spread = seen.mean(0), seen.std(0)
    generator = np.random.default_rng(seed)

    def change(image: np.ndarray) -> np.ndarray:
        lab = to_lab(image)
        mean, deviation = statistics(lab)
        to_mean, to_deviation = generator.normal(center, spread)
        moved = (lab - mean) / np.maximum(deviation, 1) * np.abs(to_deviation) + to_mean
        return cv2.cvtColor(moved.round().clip(0, 255).astype(np.uint8), cv2.COLOR_LAB2RGB)

    return change


def hed_jitter(images: Tensor, seed: int) -> Array:
    """HED jitter (arXiv 1902.06543): each stain of Ruifrok and Johnston scaled and shifted; our code."""
    from skimage.color import hed_from_rgb, rgb_from_hed

    generator = np.random.default_rng(seed)

    def change(image: np.ndarray) -> np.ndarray:
        density = -np.log((image.astype(np.float32) + 1) / 256)
        factor = generator.uniform(1 - HED_STRENGTH, 1 + HED_STRENGTH, 3)
        shift = generator.uniform(-HED_STRENGTH, HED_STRENGTH, 3)
        stains = density @ hed_from_rgb * factor + shift
        return (256 * np.exp(-stains @ rgb_from_hed) - 1).round().clip(0, 255).astype(np.uint8)

    return change


def stain_augmentor(images: Tensor, seed: int) -> Array:
    """TIAToolbox, with the stains of each image; an image whose stains are not found stays as it is.

    By Macenko's method, as its default, Vahadane's, takes five times as long.
    """
    from tiatoolbox.tools.stainaugment import StainAugmentor

    generator = np.random.default_rng(seed)

    class Seeded(StainAugmentor):
        def _sample_params(self) -> None:
            self.alpha = generator.uniform(1 - self.sigma1, 1 + self.sigma1)
            self.beta = generator.uniform(-self.sigma2, self.sigma2)

    def change(image: np.ndarray) -> np.ndarray:
        # A new one each time, as it keeps the stains of the first image.
        augmentor = Seeded("macenko")
        try:
            with np.errstate(invalid="raise"):
                return augmentor(image)
        except (ValueError, FloatingPointError, np.linalg.LinAlgError):
            return image

    return change


def color_jitter(images: Tensor, seed: int) -> Augment:
    jitter = v2.ColorJitter(**COLOR_JITTER)
    return lambda batch: torch.stack([jitter(image) for image in batch])


AUGMENTATIONS = {
    "perturbstain": Augmentation("stainnorm_transform", perturb_stain, of_arrays=False),
    "hestain": Augmentation("albumentations", hestain),
    "randstainna": Augmentation("cv2", randstainna),
    "hed-jitter": Augmentation("skimage", hed_jitter),
    "color-jitter": Augmentation("torchvision", color_jitter, of_arrays=False),
    "stain-augmentor": Augmentation("tiatoolbox", stain_augmentor),
}
