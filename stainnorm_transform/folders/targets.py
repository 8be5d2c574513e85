"""Images of the target, to train on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from stainnorm_transform.folders.images import flatten, is_mask, read


class ImageFiles(Dataset[Tensor]):
    """The images of files as uint8 tensors (3, H, W), on white glass where transparent.

    Args:
        paths: the files.
        memory: how many bytes of images to keep, instead of reading them again.
    """

    def __init__(self, paths: Sequence[Path], memory: int = 1 << 30) -> None:
        self.paths = list(paths)
        self.memory = memory
        self.kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        if index in self.kept:
            return self.kept[index]
        try:
            image = _read(self.paths[index])
        except Exception as error:
            raise ValueError(f"{self.paths[index]}: {error or type(error).__name__}") from error
        if image.nbytes <= self.memory:
            self.memory -= image.nbytes
            self.kept[index] = image
        return image

    def __getstate__(self) -> dict[str, Any]:
        # Processes that do not share memory read what they need themselves.
        return {"paths": self.paths, "memory": 0, "kept": {}}


def _read(path: Path) -> Tensor:
    image = read(path)
    if is_mask(image):
        raise ValueError("few flat colors: a label mask, or blank")
    return pil_to_tensor(flatten(image))
