"""The color map of a slide."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from render_tiles import LABS
from synthetic import make_slide, on_glass, tissue

from stainnorm_transform import NormalizeStain
from stainnorm_transform.color import color_terms, fade, rgb_to_lab
from stainnorm_transform.estimate import map_of, offset_of, robust_sum, tissue_sums
from stainnorm_transform.slides import Slide, sampling, slide_normalizer
from stainnorm_transform.slides.sampling import places, sampled_side


def test_the_map_is_that_of_its_tissue_tiles(tmp_path, normalize):
    """Of the tissue in the middle, by tiles of 256 pixels, which at 20x are 128 micrometers."""
    pixels = on_glass(tissue(1024, 1024), 2048, 2048)
    with Slide(make_slide(tmp_path / "a.svs", pixels, levels=(4, 16))) as slide:
        found = slide_normalizer(slide, normalize)
        cut = [slide.read(x, y, 256, 256) for y in range(512, 1536, 256) for x in range(512, 1536, 256)]
    assert found.tiles == 16
    assert torch.allclose(found.normalize.fixed_map, normalize.for_slide(cut).fixed_map, atol=1e-4)
    sums = torch.stack([tissue_sums(normalize.network, tile) for tile in cut]).sum(dim=0)
    assert torch.allclose(found.offset, offset_of(sums), atol=1e-4)
    assert found.normalize.fixed_map[:, 1:].abs().max() > 0.1


def test_the_map_is_always_the_same(slide_path, normalize):
    with Slide(slide_path) as slide:
        maps = [slide_normalizer(slide, normalize, threads).normalize.fixed_map for threads in (1, 2, 5)]
    assert torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], maps[2])


def test_without_small_levels_tiles_are_looked_through(tmp_path, normalize):
    pixels = on_glass(tissue(1024, 1024), 2048, 2048)
    maps = []
    for levels in ((), (4, 16)):
        with Slide(make_slide(tmp_path / "a.svs", pixels, levels=levels)) as slide:
            found = slide_normalizer(slide, normalize)
        assert found.tiles == 16
        maps.append(found.normalize.fixed_map)
    assert torch.allclose(*maps, atol=1e-4)


def test_no_more_tiles_are_read_than_needed(tmp_path, normalize, monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLED_TILES", 5)
    with Slide(make_slide(tmp_path / "a.svs", tissue(1024, 1024))) as slide:
        assert slide_normalizer(slide, normalize).tiles == 5


def test_places_begin_with_much_tissue_and_are_spread_evenly(tmp_path):
    pixels = on_glass(tissue(2048, 4096), 4096, 6144)
    pixels[-256:, -256:-100] = tissue(256, 156)  # over half of a tile, and
    pixels[:256, :100] = tissue(256, 100)  # less than half
    with Slide(make_slide(tmp_path / "a.svs", pixels, levels=(16,))) as slide:
        found = list(places(slide, 256, 1))
    assert len(found) == len(set(found)) == 8 * 16 + 2
    assert found[-1] == (0, 0)
    for count in (16, 32, 64, 128):
        x, y = np.array(found[:count]).mean(axis=0)
        assert abs(x - 2944) < 600
        assert abs(y - 1920) < 300
        assert len({row for _, row in found[:count]}) >= min(8, count / 2)


@pytest.mark.parametrize(
    ("mpp", "objective", "side"),
    [
        (0.25, 40, 512),
        (0.5, 20, 256),
        (0.5, 40, 256),
        (None, 20, 256),
        (None, None, 512),
        (0.1, 40, 1024),
        (8.0, 5, 128),
    ],
)
def test_tiles_of_the_estimate_are_as_large_on_the_glass(tmp_path, mpp, objective, side):
    with Slide(make_slide(tmp_path / "a.svs", tissue(300, 300), mpp=mpp, objective=objective)) as slide:
        assert sampled_side(slide) == side


def test_blank_slides_have_no_map(tmp_path, normalize):
    for levels in ((), (4,)):
        path = make_slide(tmp_path / "a.svs", np.full((600, 700, 3), 243, np.uint8), levels=levels)
        with Slide(path) as slide:
            fixed, offset, tiles, *_ = slide_normalizer(slide, normalize)
        assert tiles == 0
        assert torch.equal(fixed.fixed_map, torch.zeros(2, 4))
        assert offset.tolist() == [0, 0]


def test_a_fixed_map_is_taken(slide_path, normalize):
    given_one = NormalizeStain(normalize.network, fixed_map=torch.tensor([[3.0, 0, 0.5, 0], [-4, 0, 0, 0]]))
    with Slide(slide_path) as slide:
        fixed, offset, tiles, *_ = slide_normalizer(slide, given_one)
    assert fixed is given_one
    assert offset.tolist() == [3, -4]
    assert tiles is None


def test_slides_smaller_than_a_tile_have_a_map(tmp_path, normalize):
    pixels = tissue(100, 90)
    with Slide(make_slide(tmp_path / "a.svs", pixels, levels=())) as slide:
        found = slide_normalizer(slide, normalize)
    assert found.tiles == 1
    expected = normalize.for_slide([torch.from_numpy(pixels).permute(2, 0, 1)])
    assert torch.allclose(found.normalize.fixed_map, expected.fixed_map, atol=1e-3)


def test_a_target_of_offsets_alone_gives_a_slide_one(slide_path, normalize):
    plain = NormalizeStain(normalize.network, slopes=False)
    with Slide(slide_path) as slide:
        fixed, offset, _, *_ = slide_normalizer(slide, plain)
    assert torch.equal(fixed.fixed_map[:, 0], offset)
    assert not fixed.fixed_map[:, 1:].any()


def moved_by(color_map, pixels):
    """How far a map moves each pixel of an image (3, H, W): (2, H, W)."""
    lab = rgb_to_lab(pixels[None] / 255)
    return (torch.einsum("ij,njyx->niyx", color_map, color_terms(lab)) * fade(lab[:, :1]))[0]


def test_pen_on_part_of_the_tissue_hardly_moves_the_map(tmp_path, normalize):
    clean = tissue(2048, 2048)
    marked = clean.copy()
    marked[:400] = (clean[:400] * np.array([0.25, 0.6, 0.4])).astype(np.uint8)  # green ink, a fifth of the slide
    maps, offsets = [], []
    for pixels in (clean, marked):
        with Slide(make_slide(tmp_path / "a.svs", pixels, levels=(4, 16))) as slide:
            fixed, offset, _, *_ = slide_normalizer(slide, normalize)
        maps.append(fixed.fixed_map)
        offsets.append(offset)
    tiles = torch.from_numpy(marked).permute(2, 0, 1).unfold(1, 256, 256).unfold(2, 256, 256).permute(1, 2, 0, 3, 4)
    tiles = tiles.reshape(-1, 3, 256, 256)
    naive = offset_of(tissue_sums(normalize.network, tiles).sum(dim=0))
    moved = (offsets[1] - offsets[0]).norm()
    assert moved < 1
    assert (naive - offsets[0]).norm() > 3 * moved
    # So for the colors of the tissue, by the whole map.
    colors = torch.from_numpy(clean[:512, :512]).permute(2, 0, 1)
    far = moved_by(normalize.for_slide(tiles).fixed_map - maps[0], colors).norm(dim=0).mean()
    assert far > 3 * moved_by(maps[1] - maps[0], colors).norm(dim=0).mean()


def sums_of(tiles):
    """What ``tissue_sums`` would be of tiles, of each its offset and three colors (z of a map), and their shares."""
    found = []
    for (a, b), colors in tiles:
        z = torch.cat([torch.ones(3, 1), torch.tensor(colors)], dim=1)
        outputs = torch.tensor([a, b]) + 0.1 * z[:, 1:3]
        found.append(torch.cat([z, outputs - outputs.mean(dim=0) + torch.tensor([a, b])], dim=1).T @ z / 3)
    return torch.stack(found)


NUMBERS = st.floats(-1, 1, width=32)
COLORS = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=3, max_size=3)


@given(
    st.lists(st.tuples(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), COLORS), min_size=3, max_size=30),
    st.floats(-20, 20),
    st.randoms(),
)
def test_the_sum_without_far_tiles(tiles, shift, random):
    sums = sums_of(tiles)
    result = offset_of(robust_sum(sums))
    low, high = offset_of(sums).min(dim=0).values, offset_of(sums).max(dim=0).values
    assert ((result >= low - 1e-3) & (result <= high + 1e-3)).all()
    close = sums_of([((0.3 * a / 30, 0.3 * b / 30), colors) for (a, b), colors in tiles])
    # Tiles that agree all count; a few that are far do not, wherever they are, nor do tiles without tissue.
    assert torch.equal(robust_sum(close), close.sum(dim=0))
    few = (len(tiles) - 1) // 2
    far = close[:few].clone()
    far[:, 4:] += torch.tensor([[40.0 + abs(shift)], [-40.0]]) * far[:, :1]
    assert torch.allclose(offset_of(far), offset_of(close[:few]) + torch.tensor([40 + abs(shift), -40]), atol=1e-3)
    for place in (0, len(close)):
        mixed = torch.cat([close[:place], far, torch.zeros(2, 6, 4), close[place:]])
        assert torch.allclose(robust_sum(mixed), close.sum(dim=0), atol=1e-4)
        assert torch.allclose(map_of(robust_sum(mixed)), map_of(close.sum(dim=0)), atol=1e-3)
    shuffled = list(range(len(sums)))
    random.shuffle(shuffled)
    assert torch.allclose(robust_sum(sums[shuffled]), robust_sum(sums), atol=1e-3)


def test_no_tiles_have_no_map():
    for sums in (torch.zeros(0, 6, 4), torch.zeros(4, 6, 4)):
        assert torch.equal(robust_sum(sums), torch.zeros(6, 4))
        assert torch.equal(map_of(robust_sum(sums)), torch.zeros(2, 4))
        assert offset_of(robust_sum(sums)).tolist() == [0, 0]


def test_the_map_finds_a_known_shift(tmp_path, normalize):
    """The same tissue in another lab's colors, but for the error of the estimate."""
    offsets = {}
    for name in LABS:
        with Slide(make_slide(tmp_path / "a.svs", tissue(1024, 1024, name))) as slide:
            fixed, offsets[name], _, *_ = slide_normalizer(slide, normalize)
            again = fixed(slide.read(0, 0, 1024, 1024))
        assert normalize.estimate_offset(again).norm() < offsets[name].norm() / 2
    assert (offsets["lab_a"] - offsets["lab_b"]).norm() > 10


def test_tiles_that_differ_from_most_are_left_out_and_counted(tmp_path, normalize):
    pixels = tissue(2048, 2048)
    pixels[:512] = tissue(512, 2048, "lab_b")
    with Slide(make_slide(tmp_path / "a.svs", pixels, levels=(4, 16))) as slide:
        found = slide_normalizer(slide, normalize)
        assert (found.tiles, found.left_out) == (48, 16)
        assert found.standard_error < 0.5
        assert slide_normalizer(slide, found.normalize)[2:] == (None, None, None)
