"""The picture of what strengths of PerturbStain do to a tile."""

import sys

import numpy as np
import perturbed_draws
import pytest
import torch
from kornia.color import lab_to_rgb, rgb_to_lab
from PIL import Image
from synthetic import ROOT
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from stainnorm_transform import PerturbStain

SHIPPED = ROOT / "examples/perturbed_draws.jpg"


@pytest.fixture
def call(monkeypatch, tmp_path):
    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["perturbed_draws.py", *map(str, arguments)])
        perturbed_draws.main()

    return call


@pytest.fixture
def gray(tmp_path):
    path = tmp_path / "gray.png"
    Image.effect_noise((40, 40), 50).save(path)
    return path


def test_the_picture_in_the_readme_is_what_the_command_makes(call, tmp_path):
    call("--out", tmp_path / "draws.png")
    made = np.asarray(Image.open(tmp_path / "draws.png"), dtype=float)
    shipped = np.asarray(Image.open(SHIPPED), dtype=float)
    assert SHIPPED.stat().st_size <= 100_000
    assert np.abs(made - shipped).mean() < 4  # JPEG
    assert np.abs(made - np.roll(shipped, 100, axis=1)).mean() > 8


def test_draws_are_those_of_the_transform():
    tile, perturb = perturbed_draws.synthetic_tile(), PerturbStain(15)
    by_hand = []
    for number in range(9):
        torch.manual_seed(18 + number)
        by_hand.append(perturb(tile))
    drawn = [image for _, image in perturbed_draws.draws(tile, perturb, seed=2)]
    assert all(np.array_equal(one, other) for one, other in zip(drawn, by_hand, strict=True))
    assert len({image.tobytes() for image in drawn}) == 9


@pytest.mark.parametrize("strength", [0, 12, 20])
def test_captions_say_what_happened_to_a_usual_color(strength):
    usual = torch.tensor([60.0, 20.0, -12.0]).view(3, 1, 1).expand(3, 8, 8)
    tile = to_pil_image(lab_to_rgb(usual))
    for caption, image in perturbed_draws.draws(tile, PerturbStain(strength), seed=0):
        lightness, a, b = rgb_to_lab(pil_to_tensor(image) / 255).mean(dim=(1, 2)).tolist()
        said = [float(word) for word in caption.split(",")]
        assert said == pytest.approx([lightness - 60, a - 20, b + 12], abs=1.2)


def test_strengths_go_the_same_way():
    tile = perturbed_draws.synthetic_tile()
    weak, strong = (
        [[int(part) for part in caption.split(",")] for caption, _ in perturbed_draws.draws(tile, perturb, seed=0)]
        for perturb in (PerturbStain(5), PerturbStain(20))
    )
    assert 4 * np.array(weak) == pytest.approx(np.array(strong), abs=2.5)


def test_an_image_of_any_size_and_several_strengths(call, tmp_path):
    path = tmp_path / "wide.png"
    perturbed_draws.synthetic_tile().resize((300, 150)).save(path)
    for count in (1, 3):
        call("--tile", path, "--max-offset", *[5, 10, 15][:count], "--out", tmp_path / "draws.webp")
        with Image.open(tmp_path / "draws.webp") as sheet:
            assert sheet.height == 252 * count
    assert {entry.name for entry in tmp_path.iterdir()} == {"wide.png", "draws.webp"}


def test_what_cannot_be_drawn_is_named(refuse, gray, tmp_path):
    assert "expected --out to end in .png, .jpg" in refuse("--out", tmp_path / "draws.pdf")
    assert "none: make it first" in refuse("--out", tmp_path / "nowhere/draws.jpg")
    assert "expected a max_offset from 0 to 128 Lab units, got -1.0" in refuse("--max-offset", -1, "--out", "draws.jpg")
    assert "expected a max_offset from 0 to 128 Lab units, got nan" in refuse(
        "--max-offset", 1, "nan", "--out", "draws.jpg"
    )
    assert "expected at least one argument" in refuse("--max-offset", "--out", "draws.jpg")
    assert f"{gray}: a grey image (mode L)" in refuse("--tile", gray, "--out", "draws.jpg")
    assert [entry.name for entry in tmp_path.iterdir()] == ["gray.png"]


def test_the_tile_is_not_overwritten(refuse, tmp_path):
    path = tmp_path / "tile.png"
    perturbed_draws.synthetic_tile().save(path)
    before = path.read_bytes()
    assert "expected --out to be another file than --tile" in refuse("--tile", path, "--out", "tile.png")
    assert path.read_bytes() == before
