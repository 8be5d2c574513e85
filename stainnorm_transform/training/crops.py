"""From images of the target to training examples: crops, how much their pixels count, and maps to shift them by."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms.v2.functional import pil_to_tensor

from stainnorm_transform.color import check_image, image_of, random_factors, random_slopes, rgb_to_lab
from stainnorm_transform.estimate import tissue_weight, unit_range
from stainnorm_transform.resources import one_torch_thread
from stainnorm_transform.training.config import TrainConfig

# Consecutive crops share an image, so that it is read once for all of them.
CROPS_PER_IMAGE = 4
# Places tried in an image, and images tried, before giving up on tissue.
PLACES, IMAGES = 10, 100
# Batches whose colors identify the images.
COLOR_BATCHES = 16
# What random numbers are for.
IMAGE, PLACE, OFFSETS, JITTER, SLOPES = range(5)


class Crop(NamedTuple):
    """A crop (3, side, side) in RGB and how much its pixels count (1, side, side)."""

    image: Tensor
    weight: Tensor


class Batch(NamedTuple):
    """A batch of training examples.

    Attributes:
        crops: (N, 3, side, side) in RGB.
        weight: (N, 1, side, side), how much their pixels count.
        shift: (N, 2, 4), maps, see ``color.shift_ab``.
        jitter: (N, 2), factors of the contrast of a*, b* and of the darkness.
    """

    crops: Tensor
    weight: Tensor
    shift: Tensor
    jitter: Tensor


def batches(
    images: Any, config: TrainConfig, start: int, *, part: tuple[int, int] = (0, 1), workers: int = 0
) -> Iterator[Batch]:
    """The batches of a run from number ``start`` on; they depend on the images and the config alone.

    Args:
        images: map-style dataset, or iterable that can be read again, of images: see ``to_tensor``.
        config: the recipe.
        start: number of the first batch, from 0.
        part: (index, count): which of ``count`` equal parts of each batch.
        workers: processes that read a map-style dataset; an iterable is read here.
    """
    index, count = part
    share = config.batch_size // count
    mine = slice(index * share, (index + 1) * share)
    # The generators keep the loaders from drawing from the caller's.
    loader: Iterable[Crop]
    if _is_map_style(images):
        firsts = (number * config.batch_size + mine.start for number in range(start, config.iterations))
        loader = DataLoader(
            _DatasetCrops(images, config),
            batch_sampler=[list(range(first, first + share)) for first in firsts],
            num_workers=workers,
            generator=torch.Generator(),
        )
    else:
        whole = DataLoader(_StreamCrops(images, config), batch_size=config.batch_size, generator=torch.Generator())
        loader = (Crop(crops.image[mine], crops.weight[mine]) for crops in itertools.islice(whole, start, None))
    for number, crops in zip(range(start, config.iterations), loader, strict=False):
        yield Batch(crops.image, crops.weight, random_maps(config, number)[mine], jitter_factors(config, number)[mine])


def crop_colors(images: Any, config: TrainConfig) -> Tensor:
    """Mean RGB of the crops of the first batches, by which to tell whether images are the same, and their count."""
    first = itertools.islice(batches(images, config, 0), COLOR_BATCHES)
    colors = torch.stack([batch.crops.mean(dim=(-1, -2)) for batch in first])
    count = len(images) if _is_map_style(images) else 0
    return torch.cat([colors.flatten(), torch.tensor([float(count)])])


def random_maps(config: TrainConfig, number: int) -> Tensor:
    """The maps of batch ``number``, shape (batch_size, 2, 4), Lab units.

    Their offsets are uniform, but spread evenly over a batch, one to a stratum: the mean of a batch, which batch norm
    takes away, is then that of its colors without the noise of the shifts.
    """
    generator = _generator(config.seed, OFFSETS, number)
    count = config.batch_size
    strata = torch.stack([torch.randperm(count, generator=generator) for _ in range(2)], dim=1)
    within = torch.rand(count, 2, generator=generator)
    offsets = (2 * (strata + within) / count - 1) * config.max_offset
    slopes = random_slopes((count,), config.slope, _generator(config.seed, SLOPES, number))
    return torch.cat([offsets[..., None], slopes], dim=-1)


def jitter_factors(config: TrainConfig, number: int) -> Tensor:
    """Factors of contrast and darkness of batch ``number``, shape (batch_size, 2), log-uniform."""
    spreads = torch.tensor([config.contrast_jitter, config.darkness_jitter])
    return random_factors((config.batch_size, 2), spreads, _generator(config.seed, JITTER, number))


def each_image(images: Any) -> Iterator[Tensor]:
    """Every image of a map-style dataset or an iterable, once."""
    samples = (images[number] for number in range(len(images))) if _is_map_style(images) else images
    for sample in samples:
        yield from _unbatched(sample)


def _is_map_style(images: Any) -> bool:
    if isinstance(images, (str, bytes, Mapping)):
        raise TypeError(f"expected a dataset of images, got {type(images).__name__}")
    return hasattr(images, "__getitem__") and not isinstance(images, IterableDataset)


def to_tensor(sample: Any) -> Tensor:
    """The image of a sample, PIL of mode RGB or a tensor (3, H, W): alone, first in a tuple, or ``image`` in a dict.

    Raises:
        TypeError: it is something else, or neither uint8 nor floating point.
        ValueError: its shape or mode is another one.
    """
    image = _content(sample)
    if isinstance(image, PIL.Image.Image):
        if image.mode != "RGB":
            raise ValueError(f"expected PIL images of mode RGB, got {image.mode}")
        image = pil_to_tensor(image)
    check_image(image)
    if image.ndim != 3:
        raise ValueError(f"expected images of shape (3, H, W), got {tuple(image.shape)}")
    return image


def _content(sample: Any) -> Any:
    """The image, or batch of images, of a sample."""
    return image_of(sample[0] if isinstance(sample, (tuple, list)) and len(sample) else sample)


class _DatasetCrops(Dataset[Crop]):
    """Crop ``index`` depends on the seed and the index alone, so any process can make it."""

    def __init__(self, images: Any, config: TrainConfig) -> None:
        if len(images) == 0:
            raise ValueError("expected at least one image, got none")
        self.images = images
        self.config = config
        self.last: tuple[int, Tensor] | None = None

    def __getitem__(self, index: int) -> Crop:
        group = index // CROPS_PER_IMAGE
        for attempt in range(IMAGES):
            number = _randint(len(self.images), _generator(self.config.seed, IMAGE, group, attempt))
            crop = tissue_crop(self._read(number), self.config, index, attempt)
            if crop:
                return crop
        raise ValueError(f"{_no_tissue(self.config)} in {IMAGES} images drawn from {len(self.images)}")

    def _read(self, number: int) -> Tensor:
        if self.last is None or self.last[0] != number:
            self.last = number, to_tensor(self.images[number])
        return self.last[1]


class _StreamCrops(IterableDataset[Crop]):
    """Crops of the images in their order, again from the start when they end."""

    def __init__(self, images: Iterable[Any], config: TrainConfig) -> None:
        self.images = images
        self.config = config

    def __iter__(self) -> Iterator[Crop]:
        if iter(self.images) is self.images:
            raise TypeError("expected an iterable that can be read again, like a list or a DataLoader, not a generator")
        index = 0
        while True:
            seen, found = 0, False
            for image in each_image(self.images):
                crops = [tissue_crop(image, self.config, index + i) for i in range(CROPS_PER_IMAGE)]
                index += CROPS_PER_IMAGE
                seen, found = seen + 1, found or any(crops)
                yield from filter(None, crops)
            if not seen:
                raise ValueError("expected at least one image, got none")
            if not found:
                raise ValueError(f"{_no_tissue(self.config)} in {seen} images")


def _unbatched(sample: Any) -> Iterator[Tensor]:
    """The images of a sample, which may also be a batch (N, 3, H, W), as a DataLoader makes it."""
    content = _content(sample)
    batched = isinstance(content, Tensor) and content.ndim == 4
    yield from (to_tensor(image) for image in (content if batched else [content]))


def tissue_crop(image: Tensor, config: TrainConfig, index: int, attempt: int = 0) -> Crop | None:
    """A crop of an image (3, H, W) with enough tissue, or None where none was found in ``PLACES`` draws.

    Raises:
        ValueError: the image is smaller than a crop.
    """
    side = config.crop
    height, width = image.shape[-2:]
    if min(height, width) < side:
        raise ValueError(f"expected images of at least {side} x {side} pixels, got {height} x {width}")
    # As loader processes compute: kernels that share work among threads round differently.
    with one_torch_thread():
        return _draw_crop(image, config, _generator(config.seed, PLACE, index, attempt))


def _draw_crop(image: Tensor, config: TrainConfig, generator: torch.Generator) -> Crop | None:
    side = config.crop
    height, width = image.shape[-2:]
    low, high = (math.log(scale) for scale in config.scales)
    for _ in range(PLACES):
        scale = math.exp(low + (high - low) * float(torch.rand((), generator=generator)))
        region = min(round(side * scale), height, width)
        top, left = _randint(height - region + 1, generator), _randint(width - region + 1, generator)
        crop = unit_range(image[None, :, top : top + region, left : left + region])
        crop = F.interpolate(crop, size=(side, side), mode="area")
        crop = torch.rot90(crop, _randint(4, generator), dims=(-2, -1))
        crop = crop.flip(-1) if _randint(2, generator) else crop
        weight = tissue_weight(rgb_to_lab(crop))
        if (weight > 0).float().mean() >= config.min_tissue:
            return Crop(crop[0], weight[0])
    return None


def _no_tissue(config: TrainConfig) -> str:
    return f"no crop with {config.min_tissue:.0%} tissue (H&E, uint8 or floating point in [0, 1]?)"


def _generator(*numbers: int) -> torch.Generator:
    """A generator of its own for every tuple of numbers."""
    state = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state)


def _randint(stop: int, generator: torch.Generator) -> int:
    return int(torch.randint(stop, (), generator=generator))
