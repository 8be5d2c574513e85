"""The figures of the comparison, on images whose figures are known."""

import argparse

import pytest
import torch
from compare_camelyon17 import (
    BY_TARGET,
    CONTROL,
    SIDE,
    choose,
    compare,
    failures,
    known_changes,
    mean_match,
    measure,
    middle,
    mosaic,
    offset_only,
    other_organs,
    print_by_target,
    print_table,
    scale_stains,
    seams,
    tissue_mean,
)
from kornia.color import lab_to_rgb, rgb_to_lab
from render_tiles import LABS, render_tile
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform.color import shift_ab

OFFSET = torch.tensor([6.0, -4.0])
WHITE = torch.full((3, 96, 96), 255, dtype=torch.uint8)


def shift(image, offset=OFFSET):
    return shift_ab(image, offset, preserve_white=False)


def of_lab(lightness, a=20.0, b=-10.0):
    """An image of one a*, b* and any L* (H, W)."""
    lab = torch.stack([lightness, torch.full_like(lightness, a), torch.full_like(lightness, b)])
    return (lab_to_rgb(lab) * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def tiles():
    """Center 1 is center 0 shifted; the others are two more labs."""
    first, *others = [[render_tile(seed, 96, lab) for seed in range(3)] for lab in LABS.values()]
    return [first, [shift(tile) for tile in first], *others]


def test_figures_of_images_left_as_they_are(tiles):
    figures = measure(lambda image: image, tiles, 0)
    assert figures["told_apart"] > 0.9
    assert figures["raised"] == 0
    only_shifted = measure(lambda image: image, tiles[:2], 0)
    assert only_shifted["distance"] == pytest.approx(float(OFFSET.norm()), abs=0.3)
    assert only_shifted["equal_lightness"] == pytest.approx(float(OFFSET.norm()), abs=0.3)
    # Nuclei and stroma were shifted alike.
    assert only_shifted["nuclei"] == pytest.approx(float(OFFSET.norm()), abs=0.6)
    assert only_shifted["stroma"] == pytest.approx(float(OFFSET.norm()), abs=0.3)
    means = torch.stack([tissue_mean(tile) for tile in tiles[1]])
    assert only_shifted["spread"] == pytest.approx(float(means.var(dim=0).sum().sqrt()), abs=0.01)


def test_figures_of_the_shift_undone(tiles):
    figures = measure(lambda image: shift(image, -OFFSET), tiles[:2], 0)
    assert figures["distance"] == pytest.approx(0, abs=0.3)
    assert figures["equal_lightness"] == pytest.approx(0, abs=0.3)
    assert figures["ssim"] > 0.99
    assert figures["nuclei"] == pytest.approx(0, abs=0.3)
    assert figures["stroma"] == pytest.approx(0, abs=0.3)

    def undone_in_stroma(image):
        return torch.where(rgb_to_lab(image / 255)[:1] >= 55, shift(image, -OFFSET), image)

    figures = measure(undone_in_stroma, tiles[:2], 0)
    assert figures["nuclei"] == pytest.approx(float(OFFSET.norm()), abs=0.6)
    assert figures["stroma"] == pytest.approx(0, abs=0.3)
    assert measure(lambda image: 255 - image, tiles[:2], 0)["ssim"] < 0.5


def test_more_nuclei_are_no_other_color_at_equal_lightness():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(96, 96, generator=generator)
    pale, dark = 45 + 40 * noise, 45 + 40 * noise**3

    def tissue_of(lightness):
        lab = torch.stack([lightness, 30 - lightness / 4, lightness / 4 - 30])
        return [(lab_to_rgb(lab) * 255).round().to(torch.uint8)] * 2

    figures = measure(lambda image: image, [tissue_of(pale), tissue_of(dark)], 0)
    assert figures["distance"] > 2
    assert figures["equal_lightness"] < 0.3


def test_glass_clipping_and_exceptions(tiles):
    tiles = [[torch.cat([tile, WHITE], dim=-1) for tile in center] for center in tiles[:2]]
    assert measure(lambda image: image, tiles, 0)["glass"] == 0
    moved = measure(shift, tiles, 0)
    assert 1 < moved["glass"] < 10
    assert moved["glass_images"] == 3
    assert measure(lambda image: image, tiles, 0)["clipped"] == 0
    assert measure(lambda image: (image.int() * 3).clamp(0, 255).to(torch.uint8), tiles, 0)["clipped"] > 50
    assert measure(lambda image: 1 / 0, tiles, 0)["raised"] == 3


def test_the_control_matches_means_and_keeps_white(tiles):
    normalize = mean_match(tiles[0])
    goal = torch.stack([tissue_mean(tile) for tile in tiles[0]]).mean(dim=0)
    for tile in (tiles[1][0], tiles[2][0]):
        assert (tissue_mean(normalize(tile), like=tile) - goal).norm() < 0.3
    assert torch.equal(normalize(WHITE), WHITE)


def test_known_changes_use_images_that_were_no_reference(tiles):
    references = []

    def make(rest):
        references.append(rest)
        return lambda image: image

    names = ["a", "b", "c"]
    figures = known_changes("identity", 0, 0, make, tiles[0], names, argparse.Namespace(folds=None))
    assert [[id(tile) for tile in rest] for rest in references] == [
        [id(tile) for tile in tiles[0] if tile is not left_out] for left_out in tiles[0]
    ]
    # Shifts of up to 30 are 15 on average, less where they fade out.
    assert 7 < figures["known_offset"] < 16
    assert figures["known_stain"] > 1
    control = known_changes(CONTROL, 0, 0, mean_match, tiles[0], names, argparse.Namespace(folds=None))
    assert control["known_offset"] < 0.5 * figures["known_offset"]


def test_scaled_stains(tiles):
    tile = tiles[0][0]
    # Negative amounts of stain are cut off, so it is not exact.
    assert (scale_stains(tile, [1.0, 1.0]).int() - tile.int()).abs().float().mean() < 1
    assert (
        scale_stains(tile, [1.4, 1.4]).float().mean()
        < tile.float().mean()
        < scale_stains(tile, [0.7, 0.7]).float().mean()
    )


def test_nuclei_of_other_organs(tiles):
    first = iter([True])

    def only_once(image):
        return shift(image, -OFFSET) if next(first, False) else 1 / 0

    images, goal = tiles[1], tiles[0]
    assert other_organs(lambda image: shift(image, -OFFSET), images, goal)["monuseg"] < 2
    worse = other_organs(lambda image: shift(image, 2 * OFFSET), images, goal)
    assert worse["farther"] == 3
    assert worse["monuseg"] > 2 * float(OFFSET.norm())
    teal = torch.tensor([0, 200, 150], dtype=torch.uint8)[:, None, None]
    assert other_organs(lambda image: teal.expand_as(image), images, goal)["teal"] == 100
    # What cannot be normalized counts as it was: not farther.
    figures = other_organs(only_once, images, goal)
    assert figures["farther"] == figures["teal"] == 0
    assert 3 < figures["monuseg"] < 8


def test_an_offset_alone_is_what_the_map_does_to_the_mean_color(tiles, random_normalize):
    for image in (tiles[0][0], tiles[2][1]):
        expected = shift_ab(image, -random_normalize.estimate_offset(image)[1:])
        assert torch.equal(offset_only(random_normalize)(image), expected)
        assert not torch.equal(random_normalize(image), expected)


def test_tiles_make_a_mosaic(tiles):
    images = [tile[:, :32, :32] for tile in (*tiles[0], *tiles[2])]
    made = mosaic(images)
    assert made.shape == (3, 96, 64)
    assert torch.equal(made[:, 32:64, 32:], images[3])


def test_failures_are_counted():
    def fragile(image):
        if image.float().mean() > 250:
            raise ValueError
        return image // 10 if image.float().mean() < 150 else shift(image, torch.tensor([30.0, 30.0]))

    images = {
        name: torch.full((3, 8, 8), value, dtype=torch.uint8)
        for name, value in {"almost-white": 255, "red-pen": 200, "tissue": 201, "dark": 100}.items()
    }
    assert failures(fragile, images) == {"failed": 1, "black": 1, "tinted": 1}
    assert failures(lambda image: image, images) == {"failed": 0, "black": 0, "tinted": 0}


def test_seams_of_chosen_tiles():
    lightness = torch.full((2 * SIDE, 2 * SIDE), 55.0)
    lightness[:SIDE, :SIDE][:400] = 95
    lightness[:SIDE, SIDE:] = 70
    lightness[SIDE:, :SIDE] = 40
    field = of_lab(lightness)
    assert seams(shift, field) == (0, 0, 0, 0)

    def wrong_alone(image):
        if image.shape[-1] != SIDE:
            return image
        amount = {95: 1.0, 70: 2.0, 40: 3.0, 55: 4.0}[int(lightness[tuple(offset_of(image, field))])]
        return shift(image, torch.tensor([amount * 3, 0.0]))

    background, stroma, nuclei, every = seams(wrong_alone, field)
    assert (background, stroma, nuclei, every) == pytest.approx((3, 6, 9, 7.5), abs=0.6)


def offset_of(window, field):
    """Where the window lies in the field."""
    for top in (0, SIDE):
        for left in (0, SIDE):
            if torch.equal(field[:, top : top + SIDE, left : left + SIDE], window):
                return top, left
    raise AssertionError


def test_a_method_that_cannot_be_made_does_not_end_the_comparison(tiles, tmp_path, monkeypatch, capsys):
    def broken(rest):
        raise ValueError("no reference")

    monkeypatch.setattr(
        "compare_camelyon17.methods",
        lambda target, options: [("as scanned", 0, lambda rest: lambda image: image), ("broken", 0, broken)],
    )
    (tmp_path / "edge_cases").mkdir()
    (tmp_path / "monuseg/images").mkdir(parents=True)
    to_pil_image(tiles[2][0]).save(tmp_path / "monuseg/images/a.png")
    options = argparse.Namespace(data=tmp_path, folds=None)
    rows = compare(0, tiles, ["a", "b", "c"], options)
    assert [row.get("cannot") for row in rows] == [None, "ValueError('no reference')"]
    print_table(rows)
    print_by_target(rows, tiles)
    printed = capsys.readouterr().out
    assert "left out: broken, draw 0, target center 0: ValueError('no reference')" in printed
    for key, what in BY_TARGET.items():
        assert f"{what} by target" in printed
        assert f"| as scanned | {rows[0][key]:.1f} (1.00) |" in printed


def test_references(tiles):
    assert middle(torch.zeros(3, 2048, 600)).shape == (3, SIDE, SIDE)
    assert {id(choose(tiles[0], draw)) for draw in range(3)} == {id(tile) for tile in tiles[0]}
