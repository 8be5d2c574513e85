import os
from pathlib import Path

import pytest
import torch
from render_tiles import render_tile
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


@pytest.fixture(scope="session")
def tile() -> Tensor:
    return render_tile()


@pytest.fixture
def random_normalize() -> NormalizeStain:
    """A transform whose network is not trained but gives every image an offset of its own."""
    torch.manual_seed(0)
    network = ColorNormNet()
    with torch.no_grad():
        network.head.bias.copy_(torch.tensor([0.0, 0.4, -0.3]))  # about (8, -6) in (a*, b*)
    return NormalizeStain(network, target="random")
