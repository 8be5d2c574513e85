import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stainnorm_transform import ColorNormNet, NormalizeStain

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real H&E images."""
    folder = Path(os.environ.get("STAINNORM_DATA", ROOT / "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"no real H&E images: {folder} is not a folder (set STAINNORM_DATA)")
    return folder


def read(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def synthetic_tile(seed: int = 0, size: int = 128) -> Tensor:
    """Nuclei on textured eosin with a gap of glass, by the Beer-Lambert law: uint8, (3, size, size)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    eosin = 0.35 + 0.12 * np.sin(x / 5 + rng.uniform(0, 6)) * np.sin(y / 7) + rng.normal(0, 0.05, (size, size))
    hematoxylin = np.zeros((size, size))
    for _ in range(size * size // 300):
        cx, cy, radius = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(2, 4)
        hematoxylin = np.maximum(hematoxylin, 0.9 * ((x - cx) ** 2 + (y - cy) ** 2 < radius**2))
    glass = (x - size / 3) ** 2 + (y - size / 3) ** 2 < (size / 6) ** 2
    density = np.stack([0.65, 0.70, 0.29])[:, None, None] * hematoxylin + np.stack([0.07, 0.99, 0.11])[
        :, None, None
    ] * eosin.clip(0)
    density[:, glass] = 0
    return torch.from_numpy((255 * 10**-density).round().astype(np.uint8))


@pytest.fixture(scope="session")
def tile() -> Tensor:
    return synthetic_tile()


@pytest.fixture
def random_normalize() -> NormalizeStain:
    """A transform whose network is not trained but gives every image an offset of its own."""
    torch.manual_seed(0)
    network = ColorNormNet()
    with torch.no_grad():
        network.head.bias.copy_(torch.tensor([0.0, 0.4, -0.3]))  # about (8, -6) in (a*, b*)
    return NormalizeStain(network, target="random")
