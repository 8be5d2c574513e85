"""The offset of a slide."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from render_tiles import LABS
from synthetic import make_slide, on_glass, tissue

from stainnorm_transform import NormalizeStain
from stainnorm_transform.estimate import mean_offset, robust_mean_offset
from stainnorm_transform.slides import Slide, sampling, slide_normalizer
from stainnorm_transform.slides.sampling import places, sampled_side


def test_the_offset_is_that_of_its_tissue_tiles(tmp_path, normalize):
    """Of the tissue in the middle, by tiles of 256 pixels, which at 20x are 128 micrometers."""
    pixels = on_glass(tissue(1024, 1024), 2048, 2048)
    with Slide(make_slide(tmp_path / "a.svs", pixels, levels=(4, 16))) as slide:
        fixed, tiles = slide_normalizer(slide, normalize)
        cut = [slide.read(x, y, 256, 256) for y in range(512, 1536, 256) for x in range(512, 1536, 256)]
    assert tiles == 16
    assert torch.allclose(fixed.offset, normalize.for_slide(cut).offset, atol=1e-4)


def test_the_offset_is_always_the_same(slide_path, normalize):
    with Slide(slide_path) as slide:
        offsets = [slide_normalizer(slide, normalize, threads)[0].offset for threads in (1, 2, 5)]
    assert torch.equal(offsets[0], offsets[1])
    assert torch.equal(offsets[0], offsets[2])


def test_without_small_levels_tiles_are_looked_through(tmp_path, normalize):
    pixels = on_glass(tissue(1024, 1024), 2048, 2048)
    offsets = []
    for levels in ((), (4, 16)):
        with Slide(make_slide(tmp_path / "a.svs", pixels, levels=levels)) as slide:
            fixed, tiles = slide_normalizer(slide, normalize)
        assert tiles == 16
        offsets.append(fixed.offset)
    assert torch.allclose(*offsets, atol=1e-4)


def test_no_more_tiles_are_read_than_needed(tmp_path, normalize, monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLED_TILES", 5)
    with Slide(make_slide(tmp_path / "a.svs", tissue(1024, 1024))) as slide:
        assert slide_normalizer(slide, normalize)[1] == 5


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


def test_blank_slides_have_no_offset(tmp_path, normalize):
    for levels in ((), (4,)):
        path = make_slide(tmp_path / "a.svs", np.full((600, 700, 3), 243, np.uint8), levels=levels)
        with Slide(path) as slide:
            fixed, tiles = slide_normalizer(slide, normalize)
        assert tiles == 0
        assert fixed.offset.tolist() == [0, 0, 0]


def test_a_fixed_offset_is_taken(slide_path, normalize):
    given_one = NormalizeStain(normalize.network, offset=torch.tensor([0.0, 3.0, -4.0]))
    with Slide(slide_path) as slide:
        assert slide_normalizer(slide, given_one) == (given_one, None)


def test_slides_smaller_than_a_tile_have_an_offset(tmp_path, normalize):
    with Slide(make_slide(tmp_path / "a.svs", tissue(100, 90), levels=())) as slide:
        fixed, tiles = slide_normalizer(slide, normalize)
    assert tiles == 1
    assert torch.allclose(
        fixed.offset, normalize.for_slide([torch.from_numpy(tissue(100, 90)).permute(2, 0, 1)]).offset
    )


def test_pen_on_part_of_the_tissue_hardly_moves_the_offset(tmp_path, normalize):
    clean = tissue(2048, 2048)
    marked = clean.copy()
    marked[:400] = (clean[:400] * np.array([0.25, 0.6, 0.4])).astype(np.uint8)  # green ink, a fifth of the slide
    offsets = []
    for pixels in (clean, marked):
        with Slide(make_slide(tmp_path / "a.svs", pixels, levels=(4, 16))) as slide:
            offsets.append(slide_normalizer(slide, normalize)[0].offset)
    tiles = torch.from_numpy(marked).permute(2, 0, 1).unfold(1, 256, 256).unfold(2, 256, 256).permute(1, 2, 0, 3, 4)
    naive = normalize.for_slide(tiles.reshape(-1, 3, 256, 256)).offset
    moved = (offsets[1] - offsets[0]).norm()
    assert moved < 1
    assert (naive - offsets[0]).norm() > 3 * moved


@given(
    st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=3, max_size=30),
    st.floats(-20, 20),
    st.randoms(),
)
def test_the_mean_without_far_tiles(offsets, shift, random):
    sums = torch.tensor([[a, b, 1.0] for a, b in offsets])
    result = robust_mean_offset(sums)
    assert result[0] == 0
    low, high = sums[:, :2].min(dim=0).values, sums[:, :2].max(dim=0).values
    assert ((result[1:] >= low - 1e-3) & (result[1:] <= high + 1e-3)).all()
    close = torch.tensor([[0.3 * a / 30, 0.3 * b / 30, 1.0] for a, b in offsets])
    # Tiles that agree all count; a few that are far do not, wherever they are.
    assert torch.allclose(robust_mean_offset(close), mean_offset(close.sum(dim=0)), atol=1e-4)
    few = (len(offsets) - 1) // 2
    far = torch.cat([close, close[:few] + torch.tensor([40.0 + abs(shift), -40.0, 0.0])])
    assert torch.allclose(robust_mean_offset(far), robust_mean_offset(close), atol=1e-4)
    shuffled = list(range(len(sums)))
    random.shuffle(shuffled)
    assert torch.allclose(robust_mean_offset(sums[shuffled]), result, atol=1e-3)


def test_no_tiles_have_no_offset():
    assert robust_mean_offset(torch.zeros(0, 3)).tolist() == [0, 0, 0]
    assert robust_mean_offset(torch.zeros(4, 3)).tolist() == [0, 0, 0]


def test_the_offset_finds_a_known_shift(tmp_path, normalize):
    """The same tissue in another lab's colors, but for the error of the estimate."""
    offsets = {}
    for name in LABS:
        with Slide(make_slide(tmp_path / "a.svs", tissue(1024, 1024, name))) as slide:
            fixed, _ = slide_normalizer(slide, normalize)
            offsets[name] = fixed.offset
            again = fixed(slide.read(0, 0, 1024, 1024))
        assert normalize.for_slide([again]).offset.norm() < fixed.offset.norm() / 2
    assert (offsets["lab_a"] - offsets["lab_b"]).norm() > 10
