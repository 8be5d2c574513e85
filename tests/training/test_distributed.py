import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from render_tiles import render_tile
from synthetic import ROOT
from torch.multiprocessing.spawn import ProcessRaisedException

from stainnorm_transform import TrainConfig, train
from stainnorm_transform.training.distributed import BatchNorm

CONFIG = TrainConfig(iterations=6, batch_size=8, crop=32, scales=(1.0, 2.0), report_every=1)
needs_gloo = pytest.mark.skipif(not dist.is_available(), reason="needs a torch with torch.distributed")


def train_and_keep_reports(folder, stop=0):
    """Also keeps the checkpoint of the first step."""
    reports, checkpoint = [], folder / "run.safetensors"

    def report(report):
        reports.append(report)
        if report.iteration == 1:
            shutil.copy(checkpoint, folder / "first.safetensors")
        if report.iteration == stop:
            raise RuntimeError(f"stopped at {stop}")

    tiles = [render_tile(seed) for seed in range(3)]
    network = train(tiles, CONFIG, held_out=[render_tile(9)], checkpoint=checkpoint, report=report)
    return network.state_dict(), reports


def one_process(rank, folder, stop=0):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    # Only the first process sees the checkpoint.
    state, reports = train_and_keep_reports(folder if rank == 0 else folder / "none", stop)
    losses = torch.tensor([report.loss for report in reports])
    errors = torch.tensor([report.held_out_error or (math.nan, math.nan) for report in reports])
    torch.save({"state": state, "losses": losses, "errors": errors}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def in_two_processes(*arguments):
    # A fork starts at once, but CUDA and the threads of its gradients do not survive one.
    method = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(one_process, arguments, nprocs=2, start_method=method)


def results(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """The folder of a run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(folder)
    return folder


def assert_same_first_step(path, expected_path):
    """To the precision of float32: gradients by Adam's averages of them, and what batch norm has seen."""
    tensors, expected = (safetensors.torch.load_file(path) for path in (path, expected_path))
    gradients = [name for name in expected if name.endswith(".exp_avg")]
    given, wanted = (torch.cat([state[name].flatten() for name in gradients]) for state in (tensors, expected))
    assert wanted.norm() > 0
    assert (given - wanted).norm() < 1e-5 * wanted.norm()
    clear = wanted.abs() > 1e-3 * wanted.abs().max()
    assert clear.float().mean() > 0.5
    # Adam divides a gradient by its size, and so shows the rounding of those that are nearly 0.
    names = [name.replace("optimizer.", "network.").removesuffix(".exp_avg") for name in gradients]
    given, wanted = (torch.cat([state[name].flatten() for name in names])[clear] for state in (tensors, expected))
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-7)
    for name in (name for name in expected if "running" in name):
        torch.testing.assert_close(tensors[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


@needs_gloo
def test_two_processes_train_as_one_does(tmp_path, by_two):
    """The first step is the same; later ones differ as much as training amplifies rounding, on every processor."""
    _, reports = train_and_keep_reports(tmp_path)
    assert_same_first_step(by_two / "first.safetensors", tmp_path / "first.safetensors")
    first, second = results(by_two)
    torch.testing.assert_close(first["losses"], torch.tensor([report.loss for report in reports]), rtol=1e-3, atol=0)
    errors = torch.tensor([report.held_out_error for report in reports])
    torch.testing.assert_close(first["errors"], errors, rtol=0, atol=0.1)
    assert len(second["losses"]) == 0
    for name, value in first["state"].items():
        assert torch.equal(second["state"][name], value), name


@needs_gloo
def test_batch_norm_of_one_process_is_torchs(tmp_path):
    torch.manual_seed(0)
    reference, ours = torch.nn.BatchNorm2d(3), BatchNorm(3)
    ours.load_state_dict(reference.state_dict())
    image = torch.randn(4, 3, 8, 8) * 5 + 2
    inputs = [image.clone().requires_grad_() for _ in range(2)]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        outputs = [layer(input) for layer, input in zip((reference, ours), inputs, strict=True)]
        for output in outputs:
            (output**3).sum().backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    torch.testing.assert_close(ours.eval()(image), reference.eval()(image))


@needs_gloo
def test_a_batch_that_cannot_be_shared(tmp_path, monkeypatch):
    monkeypatch.setattr("stainnorm_transform.training.loop.rank_and_count", lambda: (0, 3))
    with pytest.raises(ValueError, match="a batch_size that 3 processes can share, got 8"):
        train([render_tile()], CONFIG)


@needs_gloo
@pytest.mark.slow
def test_torchrun_writes_and_prints_once(tmp_path):
    out = tmp_path / "lab.safetensors"
    stainnorm = Path(sys.executable).with_name("stainnorm")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--no-python"]
    command += [stainnorm, "train", ROOT / "examples/tiles/lab_a", "--out", out, "--device", "cpu"]
    command += ["--iterations", "4", "--batch-size", "4", "--report-every", "2", "--crop", "32"]
    result = run(command)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("images to train on: 1") == 1
    assert result.stdout.count("iteration 4: loss") == 1
    assert result.stdout.count(f"weights: {out}") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["lab.safetensors"]


@needs_gloo
def test_two_processes_go_on_where_two_stopped(tmp_path, by_two):
    """To the bit: the same operations in the same order, on the same machine and one thread each."""
    with pytest.raises(ProcessRaisedException, match="stopped at 4"):
        in_two_processes(tmp_path, 4)
    (tmp_path / "meeting").unlink(missing_ok=True)
    in_two_processes(tmp_path)
    first, second = results(tmp_path)
    assert len(first["losses"]) == 2
    for name, value in results(by_two)[0]["state"].items():
        assert torch.equal(first["state"][name], value), name
        assert torch.equal(second["state"][name], value), name


def run(command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
