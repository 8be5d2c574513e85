import os
import struct
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from render_tiles import render_tile
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform import ColorNormNet, NormalizeStain, TrainConfig, weights
from stainnorm_transform.cli import main

ROOT = Path(__file__).parent.parent

settings.register_profile("fuzz", max_examples=5000, derandomize=False)


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


@pytest.fixture
def trained(tmp_path_factory, random_normalize):
    """A weights file that moves every tissue by about (-8, 6)."""
    path = tmp_path_factory.mktemp("weights") / "test.safetensors"
    weights.save(random_normalize.network, path, TrainConfig())
    return path


@pytest.fixture
def run(trained, tmp_path):
    """The command stainnorm normalize, into a folder of the test."""

    def run(*inputs, out="out", options=()):
        return main(["normalize", *map(str, inputs), "--out", str(tmp_path / out), "--weights", str(trained), *options])

    return run


def png(width, height, *chunks, bits=8):
    """A PNG file of mode RGB, chunk by chunk: (kind, content)."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in [(b"IHDR", header), *chunks, (b"IEND", b"")])


def save(path, image=None, **options):
    """Writes an image, by default a tile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (to_pil_image(render_tile()) if image is None else image).save(path, **options)
    return path
