import contextlib
import fcntl
import functools
import os
import struct
import subprocess
import sys
import termios
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from hypothesis import settings
from render_tiles import LABS, render_tile
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform import ColorNormNet, NormalizeStain, TrainConfig, files, weights
from stainnorm_transform.cli import main

COMMAND = [sys.executable, "-c", "import sys; from stainnorm_transform.cli import main; sys.exit(main())", "normalize"]
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


@pytest.fixture(autouse=True)
def as_a_new_process():
    files.remove_leftovers.cache_clear()


@pytest.fixture
def start(trained, tmp_path):
    """Starts the command in a process of its own."""

    def start(folder, *options, out=tmp_path / "out"):
        command = [*COMMAND, folder, "--weights", trained, "--out", out, *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB, and a function that changes its mount options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted by root only")

    def remount(options):
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    yield folder, remount
    subprocess.run(["umount", "-l", str(folder)], check=True)


def make_slide(path, pixels, tile=(240, 240), levels=(4,), compression="zlib", mpp=0.5, objective=20, **options):
    """A slide in Aperio's layout of pixels (H, W, 3), by tifffile, with a thumbnail and smaller levels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = pixels.shape[:2]
    details = (f"|AppMag = {objective}" if objective else "") + (f"|MPP = {mpp}" if mpp else "")
    base = {"photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        text = f"Aperio Image Library v0\n{width}x{height} ({tile[0]}x{tile[1]}){details}"
        file.write(pixels, tile=tile, compression=compression, description=text, **base, **options)
        small = pixels[:: max(1, height // 100), :: max(1, width // 100)]
        file.write(np.ascontiguousarray(small), description="Aperio Image Library v0\nthumbnail", **base)
        for downsample in levels:
            level = F.avg_pool2d(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float(), downsample).round().byte()
            file.write(level.permute(1, 2, 0).numpy(), tile=tile, compression=compression, description=text, **base)
        for number, name in ((1, "label"), (9, "macro")):
            image = np.full((40, 60, 3), 200 + number, np.uint8)
            file.write(image, subfiletype=number, description=f"Aperio Image Library v0\n{name} 60x40", **base)
    return path


@functools.cache
def _tiles(lab):
    return [render_tile(seed, 256, LABS[lab]).permute(1, 2, 0).numpy() for seed in range(5)]


def tissue(height, width, lab="lab_a"):
    """Synthetic tissue (H, W, 3): five tiles, in turn."""
    tiles = _tiles(lab)
    rows = [
        np.concatenate([tiles[(row + column) % 5] for column in range(-(-width // 256))], 1)
        for row in range(-(-height // 256))
    ]
    return np.ascontiguousarray(np.concatenate(rows)[:height, :width])


def in_a_terminal(command, columns):
    """What a command that succeeds prints to a terminal on its stderr, line by line."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(ours, 1000):
            printed += chunk
    assert process.wait() == 0
    return printed.decode().replace("\n", "\r").split("\r")


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
