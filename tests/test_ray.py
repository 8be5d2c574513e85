"""Normalizing on a Ray cluster of two workers on this machine."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import COMMAND, make_slide, save, tissue
from safetensors.torch import load_file
from test_faults import rows

ray = pytest.importorskip("ray")


@pytest.fixture
def start_on_ray(trained, tmp_path):
    """Starts the command on a cluster of its own with two CPUs."""

    def start_on_ray(*options):
        code = COMMAND[2].replace("; sys.exit", "; import ray; ray.init(num_cpus=2, log_to_driver=False); sys.exit")
        command = [sys.executable, "-c", code, "normalize", tmp_path / "in", "--out", tmp_path / "out"]
        command += ["--weights", trained, "--ray", "--threads", "1", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    return start_on_ray


def manifest(out):
    with (out / "manifest.csv").open(newline="") as file:
        return {row["output"]: row for row in csv.DictReader(file)}


def open_files(folder):
    """Processes that write to a temporary file in a folder."""
    found = {}
    for process in os.listdir("/proc"):
        if process.isdecimal():
            try:
                for handle in os.listdir(f"/proc/{process}/fd"):
                    path = os.readlink(f"/proc/{process}/fd/{handle}")
                    if path.startswith(f"{folder}/.stainnorm-"):
                        found[int(process)] = path
            except OSError:
                continue
    return found


@pytest.mark.slow
def test_nothing_is_lost_or_done_twice_when_a_worker_is_killed(start_on_ray, tmp_path):
    out = tmp_path / "out"
    for number in range(6):
        make_slide(tmp_path / f"in/{number}.svs", tissue(3000, 3000))
    save(tmp_path / "in/tile.png")
    (tmp_path / "in/bad.svs").write_bytes(b"abc")
    process = start_on_ray("--overview")
    # One worker is killed while it writes a slide, after another has been finished.
    while not list(out.glob("*.tif")) or not (writing := open_files(out)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    killed, _ = writing.popitem()
    os.kill(killed, signal.SIGKILL)
    output, error = process.communicate(timeout=200)
    assert process.returncode == 1, error
    assert "7 of 8 images normalized" in output
    assert "bad.svs: not a slide of a format" in error
    names = {f"{number}.tif" for number in range(6)} | {"tile.png"}
    assert {path.name for path in out.iterdir()} == names | {"offsets.csv", "manifest.csv", "overview.png"}
    listed = [row["output"] for row in rows(out)]
    assert set(listed) == names
    # The line comes before the name: the slide of the killed worker may have two.
    assert len(listed) - len(names) <= 1
    found = manifest(out)
    assert {name for name, row in found.items() if row["status"] == "normalized"} == names
    assert found["bad.tif"]["status"] == "failed"
    assert "not a slide" in found["bad.tif"]["message"]
    # A worker may die between finishing a slide and saying so.
    assert sum(found[name]["seconds"] == "" for name in names) <= 1
    # The next run does what is left, and that is nothing.
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tif")}
    process = start_on_ray()
    output, error = process.communicate(timeout=200)
    assert "7 of 8 images normalized" in output
    assert "7 of them by an earlier run" in output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {row["status"] for row in manifest(out).values()} == {"finished before", "failed"}


@pytest.mark.slow
def test_given_offsets_and_a_manifest_of_others(start_on_ray, tmp_path):
    make_slide(tmp_path / "in/a.svs", tissue(300, 300))
    save(tmp_path / "in/b.png")
    table = tmp_path / "table.csv"
    table.write_text("input,offset_a,offset_b\na.svs,1,2\n")
    process = start_on_ray("--offset", str(table))
    _, error = process.communicate(timeout=200)
    assert process.returncode == 1
    assert f"b.png: it is not in {table}" in error
    assert [(row["offset_a"], row["offset_b"]) for row in rows(tmp_path / "out")] == [("1.000", "2.000")]
    (tmp_path / "out/manifest.csv").write_text("mine")
    process = start_on_ray()
    _, error = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "manifest.csv is not a manifest of this command, and is not replaced" in error
    assert (tmp_path / "out/manifest.csv").read_text() == "mine"


@pytest.mark.slow
def test_more_threads_than_any_machine_has_are_refused(start_on_ray, tmp_path):
    save(tmp_path / "in/tile.png")
    process = start_on_ray("--threads", "3")
    _, error = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "no machine of the cluster has 3 CPUs, but 2: choose --threads" in error


def test_without_ray_it_is_said_what_to_install(run, tmp_path, monkeypatch, capsys):
    save(tmp_path / "in/tile.png")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(tmp_path / "in", options=["--ray"]) == 2
    assert 'pip install "stainnorm-transform[ray]"' in capsys.readouterr().err


@pytest.mark.slow
def test_features_of_an_archive(tmp_path):
    """The example, with a slide that fails, and again."""
    for name in ("a", "b"):
        make_slide(tmp_path / f"in/{name}.svs", tissue(500, 500))
    (tmp_path / "in/bad.svs").write_bytes(b"abc")
    script = Path(__file__).parent.parent / "examples/ray_features.py"
    command = [sys.executable, script, tmp_path / "in", "--out", tmp_path / "out"]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 1, first.stderr
    assert "bad.svs: ValueError: not a slide" in first.stderr + first.stdout
    files = {path.name: load_file(path) for path in (tmp_path / "out").iterdir()}
    assert files.keys() == {"a.svs.safetensors", "b.svs.safetensors"}
    assert files["a.svs.safetensors"]["features"].shape == (4, 2048)
    assert files["a.svs.safetensors"]["corners"].tolist() == [[0, 0], [224, 0], [0, 224], [224, 224]]
    (tmp_path / "in/bad.svs").unlink()
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert "0slide" in second.stderr
