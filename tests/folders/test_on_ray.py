"""Normalizing on a Ray cluster of two workers on this machine."""

import csv
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from synthetic import ROOT, make_slide, rows, save, tissue

from stainnorm_transform.folders.record import MAP_FIELDS

ray = pytest.importorskip("ray", reason='needs Ray: pip install -e ".[ray]"')


COMMAND = """
import os, signal, sys
import ray
from stainnorm_transform.cli.main import main
from stainnorm_transform.folders import ray as tasks
from stainnorm_transform.slides.pyramid import Pyramid

normalize, marker = tasks._normalize, sys.argv[1]

def die_once(settings, path, *rest):
    if path.name == "3.svs" and not os.path.exists(marker):
        os.close(os.open(marker, os.O_CREAT))
        Pyramid._add = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return normalize(settings, path, *rest)

if marker:
    tasks._normalize = die_once
ray.init(num_cpus=2, log_to_driver=False)
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def run_on_ray(trained, tmp_path):
    """The command on a cluster of its own with two CPUs; with a marker, a worker dies as it writes 3.svs."""

    def run_on_ray(*options, marker=""):
        command = [sys.executable, "-c", COMMAND, marker, "normalize", tmp_path / "in", "--out", tmp_path / "out"]
        command += ["--weights", trained, "--ray", "--threads", "1", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run_on_ray


def manifest(out):
    with (out / "manifest.csv").open(newline="") as file:
        return {row["output"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_nothing_is_lost_or_done_twice_when_a_worker_is_killed(run_on_ray, tmp_path):
    out = tmp_path / "out"
    for number in range(6):
        make_slide(tmp_path / f"in/{number}.svs", tissue(1500, 1500))
    save(tmp_path / "in/tile.png")
    (tmp_path / "in/bad.svs").write_bytes(b"abc")
    done = run_on_ray("--overview", "--report", marker=tmp_path / "killed")
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "killed").exists()
    assert "7 of 8 images normalized" in done.stdout
    assert "bad.svs: not a slide of a format" in done.stderr
    names = {f"{number}.tif" for number in range(6)} | {"tile.png"}
    assert {path.name for path in out.iterdir()} == names | {
        "offsets.csv",
        "manifest.csv",
        "overview.png",
        "report.html",
    }
    listed = [row["output"] for row in rows(out)]
    assert set(listed) == names
    assert len(listed) == len(names)
    found = manifest(out)
    assert {name for name, row in found.items() if row["status"] == "normalized"} == names
    assert found["bad.tif"]["status"] == "failed"
    assert "not a slide" in found["bad.tif"]["message"]
    assert all(found[name]["seconds"] for name in names)
    # The next run does what is left, and that is nothing.
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tif")}
    done = run_on_ray()
    assert "7 of 8 images normalized" in done.stdout
    assert "7 of them by an earlier run" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {row["status"] for row in manifest(out).values()} == {"finished before", "failed"}


@pytest.mark.slow
def test_given_offsets_and_a_manifest_of_others(run_on_ray, tmp_path):
    make_slide(tmp_path / "in/a.svs", tissue(300, 300))
    save(tmp_path / "in/b.png")
    table = tmp_path / "table.csv"
    table.write_text(f"input,offset_a,offset_b,{','.join(MAP_FIELDS)}\na.svs,1,2,1,0,0.5,0,2,0,0,0\n")
    done = run_on_ray("--offset", table)
    assert done.returncode == 1
    assert f"b.png: {table} has no line for it: neither its full path nor its name" in done.stderr
    (row,) = rows(tmp_path / "out")
    assert (row["offset_a"], row["offset_b"]) == ("1.000", "2.000")
    assert [float(row[name]) for name in MAP_FIELDS] == [1, 0, 0.5, 0, 2, 0, 0, 0]
    (tmp_path / "out/manifest.csv").write_text("mine")
    done = run_on_ray()
    assert done.returncode == 2
    assert "manifest.csv is not a manifest of this command, and is not replaced" in done.stderr
    assert (tmp_path / "out/manifest.csv").read_text() == "mine"


@pytest.mark.slow
def test_more_threads_than_any_machine_has_are_refused(run_on_ray, tmp_path):
    save(tmp_path / "in/tile.png")
    done = run_on_ray("--threads", "3")
    assert done.returncode == 2
    assert "no machine of the cluster has 3 CPUs, but 2: choose --threads" in done.stderr


def test_without_ray_it_is_said_what_to_install(run, tmp_path, monkeypatch, capsys):
    save(tmp_path / "in/tile.png")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(tmp_path / "in", options=["--ray"]) == 2
    assert 'run pip install ".[ray]"' in capsys.readouterr().err


@pytest.mark.slow
def test_features_of_an_archive(tmp_path):
    """The example, with a slide that fails, and again."""
    for name in ("a", "b"):
        make_slide(tmp_path / f"in/{name}.svs", tissue(500, 500))
    (tmp_path / "in/bad.svs").write_bytes(b"abc")
    script = ROOT / "examples/ray_features.py"
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
