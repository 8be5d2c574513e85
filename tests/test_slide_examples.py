"""The scripts that make slides and measure with them."""

import sys

import benchmark_slides
import make_slide
import pytest
import slide_sample
import torch

from stainnorm_transform.slides import Slide


@pytest.fixture
def mosaic(data, tmp_path):
    path = tmp_path / "mosaic.tif"
    make_slide.make_slide(data, path, 3000, 2100, center=2, tissue=0.7)
    return path


def test_a_mosaic_is_a_slide_of_tissue_on_glass(mosaic):
    with Slide(mosaic) as slide:
        assert slide.dimensions == (3000, 2100)
        assert slide.mpp == (0.25, 0.25)
        assert slide.objective == 40
        assert slide.read(0, 0, 50, 50).float().mean() > 235
        assert slide.read(1400, 1000, 200, 200).float().mean() < 220


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    script.main()


def test_the_error_of_samples_falls_with_their_size(mosaic, monkeypatch, capsys):
    monkeypatch.setattr(slide_sample, "SIZES", (2, 10))
    monkeypatch.setattr(slide_sample, "STARTS", 5)
    monkeypatch.setattr(slide_sample, "INKS", {"green pen": (20, 130, 70)})
    run(monkeypatch, slide_sample, mosaic)
    lines = capsys.readouterr().out.splitlines()
    few, more = (float(line.split("|")[2]) for line in lines if line.startswith(("| 2 |", "| 10 |")))
    assert more < few
    assert any(line.startswith("| green pen | 20% |") for line in lines)


def test_ink_and_folds_darken():
    tile = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    inked = slide_sample.pen(tile, (20, 130, 70))
    assert inked.float().mean() < 200
    assert (inked == 200).any()
    assert slide_sample.fold(tile).float().mean() < 200


@pytest.mark.slow
def test_the_benchmark_measures_all_it_names(mosaic, monkeypatch, capsys):
    run(monkeypatch, benchmark_slides, mosaic, "--rounds", 1, "--threads", 1)
    output = capsys.readouterr().out
    for name in ("transcode", "normalize", "part: decode", "part: estimate", "part: look up", "part: encode"):
        row = next(line for line in output.splitlines() if line.startswith(f"| {name}"))
        assert float(row.split("|")[2].split()[0]) > 0
