"""The scripts that make slides and measure with them."""

import sys

import benchmark_slides
import make_slide
import pytest
import slide_resnet
import slide_sample
import torch
from synthetic import make_slide as make_slide_file
from synthetic import tissue
from torchvision.transforms import v2

from stainnorm_transform import NormalizeStain
from stainnorm_transform.slides import Slide, SlideTiles


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


def test_the_distance_of_maps_is_over_the_colors_of_the_tissue():
    torch.manual_seed(0)
    z = torch.cat([torch.ones(50, 1), torch.randn(50, 3)], dim=1)
    weight = torch.rand(50, 1)
    sums = torch.cat([(weight * z).T @ z, torch.zeros(2, 4)])
    maps = torch.randn(3, 2, 4)
    expected = [(((map_ - maps[0]) @ z.T) ** 2).sum(dim=0) @ weight[:, 0] / weight.sum() for map_ in maps]
    torch.testing.assert_close(slide_sample.distance(maps, maps[0], sums), torch.stack(expected).sqrt())
    # In other units of weight, the same; each with its own tissue.
    torch.testing.assert_close(
        slide_sample.distance(maps, maps[0], torch.stack([sums, 7 * sums, 2 * sums])), torch.stack(expected).sqrt()
    )


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


def test_a_model_over_a_slide(tmp_path):
    slide_path = make_slide_file(tmp_path / "a.svs", tissue(1100, 1500))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    x, y, logits = (torch.cat(column) for column in zip(*slide_resnet.predict(slide_path, model, "cpu"), strict=True))
    tiles = SlideTiles(slide_path, NormalizeStain.pretrained(), side=224, mpp=0.5)
    assert list(zip(x.tolist(), y.tolist(), strict=True)) == tiles.corners
    imagenet = v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    assert torch.allclose(logits[5], model(imagenet(tiles[5]["image"][None] / 255))[0], atol=1e-4)
