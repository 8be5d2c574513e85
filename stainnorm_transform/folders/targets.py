"""Images of the target to train on: those of files, and tiles of the tissue of slides."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from stainnorm_transform.color import rgb_to_lab
from stainnorm_transform.estimate import small_copy, tissue_weight
from stainnorm_transform.folders import images
from stainnorm_transform.folders.outcome import reason
from stainnorm_transform.resources import cores
from stainnorm_transform.slides import Slide, is_slide
from stainnorm_transform.slides.sampling import SAMPLED_PLACES, places, sampled_side

# So many tiles of a slide, of those that its offset is estimated from, are trained on, with this share of tissue.
SLIDE_TILES, SLIDE_TISSUE = 16, 0.25

# x, y, width, height, in pixels of level 0.
Region: TypeAlias = tuple[int, int, int, int]


class TargetImages(Dataset[Tensor]):
    """Images of files and tiles of slides as uint8 tensors (3, H, W), on white glass where transparent.

    Args:
        memory: how many bytes of images to keep, instead of reading them again.

    Attributes:
        sources: the file of each image and, of a slide, which part of it.
    """

    def __init__(self, memory: int = 1 << 30) -> None:
        self.sources: list[tuple[Path, Region | None]] = []
        self.memory = memory
        self.kept: dict[int, Tensor] = {}
        # The slide that was read last, and by which process.
        self._slide: tuple[int, Slide] | None = None

    def add(self, path: Path, check: Callable[[Tensor], None]) -> list[int]:
        """Adds the image of a file; or of a slide up to ``SLIDE_TILES`` tiles, spread evenly over its tissue.

        Tiles are as those of ``slide_normalizer``, of level 0 and 128 micrometers a side, and a quarter tissue or more.

        Args:
            path: of the file.
            check: raises ValueError for an image that is not to be added.

        Returns:
            The numbers of what was added.

        Raises:
            ValueError: the file cannot be read, or the check refuses the image, or all tiles.
        """
        try:
            found = list(itertools.islice(self._checked(path, check), SLIDE_TILES))
        except Exception as error:
            raise ValueError(reason(error, path)) from error
        numbers = []
        for region, image in found:
            numbers.append(len(self.sources))
            self.sources.append((path, region))
            self._keep(numbers[-1], image)
        return numbers

    def slides(self, numbers: Iterable[int]) -> int:
        """Of how many slides these images are tiles."""
        return len({path for path, region in map(self.sources.__getitem__, numbers) if region is not None})

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Tensor:
        if index in self.kept:
            return self.kept[index]
        path, region = self.sources[index]
        try:
            image = _image(path) if region is None else self._open(path).read(*region)
        except Exception as error:
            raise ValueError(f"{path}: {reason(error, path)}") from error
        self._keep(index, image)
        return image

    def __getstate__(self) -> dict[str, Any]:
        # Processes that do not share memory read what they need themselves.
        return {**self.__dict__, "memory": 0, "kept": {}, "_slide": None}

    def _checked(self, path: Path, check: Callable[[Tensor], None]) -> Iterator[tuple[Region | None, Tensor]]:
        if not is_slide(path):
            image = _image(path)
            check(image)
            yield None, image
            return
        slide = self._open(path)
        problem: ValueError | None = ValueError("no tile of which a quarter is tissue")
        for region in itertools.islice(_regions(slide), SAMPLED_PLACES):
            tile = slide.read(*region)
            if _tissue_share(tile) < SLIDE_TISSUE:
                continue
            try:
                check(tile)
            except ValueError as error:
                problem = problem and error
            else:
                problem = None
                yield region, tile
        if problem:
            raise problem

    def _open(self, path: Path) -> Slide:
        if self._slide is not None and self._slide[0] == os.getpid():
            if self._slide[1].path == path:
                return self._slide[1]
            self._slide[1].close()
        self._slide = os.getpid(), Slide(path)
        return self._slide[1]

    def _keep(self, index: int, image: Tensor) -> None:
        if image.nbytes <= self.memory:
            self.memory -= image.nbytes
            self.kept[index] = image


def _image(path: Path) -> Tensor:
    image = images.read(path)
    if images.is_mask(image):
        raise ValueError("few flat colors: a label mask, or blank")
    return pil_to_tensor(images.flatten(image))


def _tissue_share(image: Tensor) -> float:
    return float((tissue_weight(rgb_to_lab(small_copy(image[None]))) > 0).float().mean())


def _regions(slide: Slide) -> Iterator[Region]:
    """Tiles that may have tissue, those with much of it first."""
    side = sampled_side(slide)
    width, height = slide.dimensions
    for x, y in places(slide, side, cores()):
        yield x, y, min(side, width), min(side, height)
