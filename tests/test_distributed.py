import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from render_tiles import render_tile
from torch.multiprocessing.spawn import ProcessRaisedException

from stainnorm_transform import TrainConfig, train
from stainnorm_transform.distributed import BatchNorm

CONFIG = TrainConfig(iterations=6, batch_size=8, crop=32, scales=(1.0, 2.0), report_every=3)
needs_gloo = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


def train_and_keep_reports(checkpoint=None, stop=0):
    reports = []

    def report(report):
        reports.append(report)
        if report.iteration == stop:
            raise RuntimeError(f"stopped at {stop}")

    tiles = [render_tile(seed) for seed in range(3)]
    network = train(tiles, CONFIG, held_out=[render_tile(9)], checkpoint=checkpoint, report=report)
    return network.state_dict(), reports


def one_process(rank, folder, checkpoint=None, stop=0):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    # Only the first process sees the checkpoint.
    state, reports = train_and_keep_reports(checkpoint if rank == 0 or not checkpoint else folder / "none", stop)
    losses = torch.tensor([report.loss for report in reports])
    errors = torch.tensor([report.held_out_error or (math.nan, math.nan) for report in reports])
    torch.save({"state": state, "losses": losses, "errors": errors}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@needs_gloo
def test_two_processes_train_as_one_does(tmp_path):
    expected, reports = train_and_keep_reports()
    torch.multiprocessing.spawn(one_process, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(first["losses"], torch.tensor([report.loss for report in reports]), rtol=1e-4, atol=1e-4)
    assert first["errors"][-1].tolist() == pytest.approx(reports[-1].held_out_error, abs=0.05)
    assert len(second["losses"]) == 0
    for name, value in expected.items():
        assert torch.equal(first["state"][name], second["state"][name])
        # Adam divides small gradients by their own size, so rounding shows.
        torch.testing.assert_close(first["state"][name], value, rtol=1e-2, atol=1e-3, msg=name)


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
    monkeypatch.setattr("stainnorm_transform.training.rank_and_count", lambda: (0, 3))
    with pytest.raises(ValueError, match="a batch_size that 3 processes can share, got 8"):
        train([render_tile()], CONFIG)


@needs_gloo
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
def test_two_processes_go_on_where_two_stopped(tmp_path):
    torch.multiprocessing.spawn(one_process, (tmp_path,), nprocs=2)
    expected = torch.load(tmp_path / "0.pt", weights_only=True)["state"]
    folder = tmp_path / "resumed"
    folder.mkdir()
    with pytest.raises(ProcessRaisedException, match="stopped at 4"):
        torch.multiprocessing.spawn(one_process, (folder, folder / "run", 4), nprocs=2)
    (folder / "meeting").unlink(missing_ok=True)
    torch.multiprocessing.spawn(one_process, (folder, folder / "run"), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first["losses"]) == 3
    for name, value in expected.items():
        assert torch.equal(first["state"][name], second["state"][name])
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-5, msg=name)


def run(command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
