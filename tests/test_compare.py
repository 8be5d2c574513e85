"""The figures of the comparison, on images whose figures are known."""

import pytest
import torch
from compare_camelyon17 import SIDE, choose, failures, mean_match, measure, middle, mosaic, seams, tissue_mean
from render_tiles import LABS, render_tile

from stainnorm_transform.color import shift_ab

OFFSET = torch.tensor([6.0, -4.0])


@pytest.fixture(scope="module")
def tiles():
    """Five centers, of which center 1 is center 0 shifted."""
    first = [render_tile(seed, 96) for seed in range(3)]
    others = [[render_tile(seed, 96, lab) for seed in range(3)] for lab in LABS.values()]
    return [first, [shift_ab(tile, OFFSET, preserve_white=False) for tile in first], *others]


def test_figures_of_images_left_as_they_are(tiles):
    figures = measure(lambda image: image, tiles, 0)
    assert figures["clipped"] == 0
    assert figures["ssim"] == pytest.approx(1)
    assert figures["told_apart"] >= 0.5
    only_shifted = measure(lambda image: image, tiles[:2], 0)
    assert only_shifted["distance"] == pytest.approx(float(OFFSET.norm()), abs=0.3)
    assert only_shifted["equal_lightness"] == pytest.approx(float(OFFSET.norm()), abs=0.3)
    assert only_shifted["distance_by_image"] >= only_shifted["distance"] - 1e-4


def test_the_shift_undone_leaves_no_distance(tiles):
    figures = measure(lambda image: shift_ab(image, -OFFSET, preserve_white=False), tiles[:2], 0)
    assert figures["distance"] == pytest.approx(0, abs=0.3)
    assert figures["equal_lightness"] == pytest.approx(0, abs=0.3)


def test_white_that_moves_is_measured(tiles):
    tiles = [[torch.cat([tile, torch.full_like(tile, 255)], dim=-1) for tile in center] for center in tiles[:2]]
    assert measure(lambda image: image, tiles, 0)["white"] == 0
    assert measure(lambda image: shift_ab(image, OFFSET), tiles, 0)["white"] == 0
    assert 1 < measure(lambda image: shift_ab(image, OFFSET, preserve_white=False), tiles, 0)["white"] < 10


def test_the_control_matches_means_and_keeps_white(tiles):
    normalize = mean_match(tiles[0])
    goal = torch.stack([tissue_mean(tile) for tile in tiles[0]]).mean(dim=0)
    after = tissue_mean(normalize(tiles[3][0]), like=tiles[3][0])
    assert (after - goal).norm() < 0.5 * (tissue_mean(tiles[3][0]) - goal).norm()
    white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    assert torch.equal(normalize(white), white)


def test_failures_are_counted():
    def fragile(image):
        if image.float().mean() > 250:
            raise ValueError
        return image // 10

    images = [torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (255, 200, 100)]
    assert failures(fragile, images) == {"exceptions": 1, "black": 2, "odd_images": 3}
    assert failures(lambda image: image, images) == {"exceptions": 0, "black": 0, "odd_images": 3}


def test_one_offset_for_all_leaves_no_seams():
    field = render_tile(0, 64).repeat(1, 32, 32)
    assert seams(lambda image: shift_ab(image, OFFSET), field) == (0, 0, 0, 0)
    assert min(seams(lambda image: image if image.shape[-1] == SIDE else shift_ab(image, OFFSET), field)) > 3


def test_references(tiles):
    assert middle(torch.zeros(3, 2048, 600)).shape == (3, SIDE, SIDE)
    assert mosaic(tiles[0]).shape == (3, 96, 3 * 96)
    chosen = {id(choose(tiles[0], draw)) for draw in range(3)}
    assert chosen == {id(tile) for tile in tiles[0]}
