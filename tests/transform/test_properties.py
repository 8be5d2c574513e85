"""What holds for every image, tried on random ones: real tissue where there is some."""

import pytest
import stability
import torch
from camelyon17 import read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kornia.color import rgb_to_lab
from render_tiles import LABS, render_tile

from stainnorm_transform import NormalizeStain
from stainnorm_transform.color import color_terms, fade, shift_ab

MANY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHIFT = st.floats(-20, 20).map(lambda value: round(value, 2))
NAMES = st.sampled_from(["camelyon17", "camelyon17-center0", "camelyon17-center2", "camelyon17-center4"])
# Largest move of the estimate in examples/stability.py, over 945 images.
LARGEST = {
    "flipped": 2.12,
    "turned by 90, 180, 270 degrees": 2.61,
    "as JPEG of quality 75": 0.47,
    "one half, and with as much white beside it": 4.34,
    "in a white frame of twice the side": 4.65,
    "at half the size": 0.17,
    "normalized before": 5.70,
    "a*, b* shifted by 10 each: error": 6.38,
}


@pytest.fixture(scope="module")
def transforms():
    names = ["camelyon17", *(f"camelyon17-center{center}" for center in range(5))]
    return {name: NormalizeStain.pretrained(name) for name in names}


@pytest.fixture(scope="module")
def paths(data):
    return stability.find(data)


synthetic = st.builds(
    render_tile, st.integers(0, 999), st.sampled_from([48, 64, 97, 128]), st.sampled_from(list(LABS.values()))
)


@given(index=st.integers(0, 10**6), name=st.sampled_from(sorted(stability.MOVES)))
@MANY
def test_the_estimate_stays_where_nothing_changed_but_the_picture(paths, transforms, index, name):
    image = stability.tile(paths[index % len(paths)])
    normalize = transforms["camelyon17"]
    if normalize.estimate_offset(image).any():
        for moved in stability.MOVES[name](normalize, image):
            assert moved <= 1.1 * LARGEST[name]


def test_on_the_whole_the_estimate_hardly_moves(paths, transforms):
    few = [stability.tile(path) for path in paths[:: len(paths) // 30]]
    normalize = transforms["camelyon17"]
    for name, most in (("flipped", 0.6), ("as JPEG of quality 75", 0.3), ("normalized before", 1.5)):
        moves = [moved for image in few for moved in stability.MOVES[name](normalize, image)]
        assert torch.tensor(moves).median() < most
    # The mean color moves less than colors do one by one.
    left = torch.stack([normalize.estimate_offset(normalize(image)).norm() for image in few])
    assert left.median() < 1


@given(index=st.integers(0, 10**6), center=st.integers(0, 4), da=SHIFT, db=SHIFT)
@MANY
def test_the_estimate_of_tissue_like_the_target_tracks_a_shift(data, transforms, index, center, da, db):
    images = sorted((data / f"camelyon17/center_{center}").glob("*.png"))
    image = read(images[index % len(images)])[:, :256, :256]
    shift = torch.tensor([da, db])
    assert stability.known_shift(transforms[f"camelyon17-center{center}"], image, shift) < 2.5 + 0.2 * shift.norm()


@given(image=synthetic, name=NAMES, da=SHIFT, db=SHIFT)
@MANY
def test_a_shift_and_back_is_nothing_inside_the_gamut(transforms, image, name, da, db):
    image, shift = image.double() / 255, torch.tensor([da, db])
    there = shift_ab(image, shift)
    inside = ((there > 1e-9) & (there < 1 - 1e-9)).all(dim=0)
    back = shift_ab(there, -shift)
    torch.testing.assert_close(back[:, inside], image[:, inside], atol=1e-9, rtol=0)
    # What is taken away can be put back.
    normalize = transforms[name]
    offset = normalize.estimate_offset(image)
    normalized = normalize.with_offset(offset)(image)
    inside = ((normalized > 1e-9) & (normalized < 1 - 1e-9)).all(dim=0)
    again = shift_ab(normalized, offset[1:].double())
    torch.testing.assert_close(again[:, inside], image[:, inside], atol=1e-6, rtol=0)


@given(image=synthetic, name=NAMES)
@MANY
def test_a_map_that_is_taken_away_can_be_put_back_inside_the_gamut(transforms, image, name):
    """It says how far a color was from what became of it: 4 equations for z."""
    normalize, image = transforms[name], image.double() / 255
    normalized, color_map = normalize(image), normalize.estimate_map(image).double()
    inside = ((normalized > 1e-9) & (normalized < 1 - 1e-9)).all(dim=0)
    before, after = (rgb_to_lab(each)[:, inside] for each in (image, normalized))
    share, step = fade(after[0])[:, None, None], torch.zeros(4, 4, dtype=torch.float64)
    step[2:] = color_map / 20
    z = torch.linalg.solve(torch.eye(4) - share * step, color_terms(after[..., None])[..., 0].T[..., None])
    again = after[1:] + (share * (color_map @ z))[..., 0].T
    torch.testing.assert_close(again, before[1:], atol=2e-3, rtol=0)


@given(index=st.integers(0, 10**6), name=NAMES)
@MANY
def test_lightness_stays_on_real_tissue(paths, transforms, index, name):
    image = stability.tile(paths[index % len(paths)])[:, :256, :256]
    normalized = transforms[name](image.double() / 255)
    inside = ((normalized > 1e-6) & (normalized < 1 - 1e-6)).all(dim=0)
    before, after, as_bytes = (
        rgb_to_lab(each.double())[0] for each in (image / 255, normalized, transforms[name](image) / 255)
    )
    assert (after - before)[inside].abs().max() < 1e-3
    # Half a level of each channel is at most 0.4 in L* for what is not almost black.
    assert (as_bytes - before)[inside & (before > 10)].abs().max() < 0.4


@given(image=synthetic, name=NAMES)
@MANY
def test_white_and_grey_are_fixed_points(transforms, image, name):
    grey = image.float().mean(dim=0, keepdim=True).round().byte().expand(3, -1, -1)
    for same in (
        grey,
        torch.full_like(image, 255),
        torch.zeros_like(image),
        torch.where(image > 128, 255, 0).byte()[:1].expand(3, -1, -1),
    ):
        assert torch.equal(transforms[name](same), same)
    white = rgb_to_lab(image / 255.0)[0] > 97
    assert torch.equal(transforms[name](image)[:, white], image[:, white])


@given(data=st.data(), name=NAMES)
@MANY
def test_batch_mates_and_order_do_not_matter(transforms, data, name):
    seeds = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=4))
    tiles = torch.stack([render_tile(seed, 64) for seed in seeds])
    tiles[data.draw(st.integers(0, len(seeds) - 1))] = data.draw(st.sampled_from([0, 128, 255]))
    order = data.draw(st.permutations(range(len(seeds))))
    normalize = transforms[name]
    for images in (tiles, tiles / 255):
        assert torch.equal(normalize(images)[order], normalize(images[order]))
        assert torch.equal(normalize.estimate_offset(images)[order], normalize.estimate_offset(images[order]))
        assert torch.equal(normalize.estimate_map(images)[order], normalize.estimate_map(images[order]))


@given(image=synthetic, name=NAMES)
@MANY
def test_a_map_moves_pixels_one_by_one(transforms, image, name):
    slide = transforms[name].for_slide([image])
    turned = slide(image.rot90(1, (-2, -1)).flip(-1))
    assert torch.equal(turned, slide(image).rot90(1, (-2, -1)).flip(-1))
    shuffled = torch.randperm(image[0].numel(), generator=torch.Generator().manual_seed(0))
    pixels = slide(image.flatten(1)[:, shuffled].view_as(image))
    assert torch.equal(pixels.flatten(1), slide(image).flatten(1)[:, shuffled])


@given(image=synthetic, name=NAMES)
@MANY
def test_the_estimate_is_zero_or_moves_toward_the_target(transforms, image, name):
    """Twice the offset is not needed: what is left is smaller than what there was, or small."""
    normalize = transforms[name]
    offset = normalize.estimate_offset(image)
    left = normalize.estimate_offset(normalize(image))
    assert left.norm() <= max(1.5, 0.5 * offset.norm())
