import os
import subprocess
from pathlib import Path

import pytest
import torch
from apart import begin
from hypothesis import settings
from render_tiles import render_tile
from synthetic import ROOT
from torch import Tensor

from stainnorm_transform import ColorNormNet, NormalizeStain, TrainConfig, files, transform, weights
from stainnorm_transform.cli.main import main
from stainnorm_transform.resources import cores


def pytest_configure(config):
    """Gives each worker of pytest-xdist its share of the cores: more threads than cores wait for each other."""
    workers = config.getoption("numprocesses", None)
    if workers:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // workers)))


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
def random_network() -> ColorNormNet:
    """A network that is not trained but gives every image an offset of its own."""
    torch.manual_seed(0)
    network = ColorNormNet().eval()
    with torch.no_grad():
        network.head.bias.copy_(torch.tensor([0.0, 0.4, -0.3]))  # about (8, -6) in (a*, b*)
    return network


@pytest.fixture
def random_normalize(random_network) -> NormalizeStain:
    return NormalizeStain(random_network, target="random")


@pytest.fixture
def trained(tmp_path_factory, random_network):
    """A weights file that moves every tissue by about (-8, 6)."""
    path = tmp_path_factory.mktemp("weights") / "test.safetensors"
    weights.save(random_network, path, TrainConfig())
    return path


@pytest.fixture
def run(trained, tmp_path):
    """The command stainnorm normalize, into a folder of the test."""

    def run(*inputs, out="out", options=()):
        # On the CPU, whose results the tests compare to the bit.
        arguments = ["--out", str(tmp_path / out), "--weights", str(trained), "--device", "cpu", *options]
        return main(["normalize", *map(str, inputs), *arguments])

    return run


@pytest.fixture
def refuse(call, capsys):
    """Runs an example by the fixture ``call`` of a test file; it must end in a message, which is returned."""

    def refuse(*arguments):
        with pytest.raises(SystemExit) as end:
            call(*arguments)
        assert end.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    return refuse


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def as_a_new_process():
    files.remove_leftovers.cache_clear()
    transform._tables.clear()


@pytest.fixture
def start(trained, tmp_path):
    """Starts the command normalize in a process of its own: see ``apart.begin``."""

    def start(path, *options, out=tmp_path / "out", **how):
        arguments = ["normalize", path, "--weights", trained, "--out", out, "--device", "cpu", *options]
        return begin(arguments, **how)

    return start


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB, and a function that changes its mount options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("run as root: a small file system is mounted")

    def remount(options):
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    yield folder, remount
    subprocess.run(["umount", "-l", str(folder)], check=True)
