"""Color maps of images: the fit to what a network says, against least squares by NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia.color import rgb_to_lab
from render_tiles import LABS, render_tile

from stainnorm_transform import ColorNormNet, NormalizeStain, estimate
from stainnorm_transform.color import MAP_UNIT, MAX_SLOPE, as_map, color_terms, shift_ab
from stainnorm_transform.estimate import (
    RIDGE,
    map_of,
    mean_terms,
    offset_of,
    small_copy,
    tissue_sums,
    tissue_weight,
)

BOTH = pytest.mark.parametrize("preserve_white", [True, False])
LIMIT = MAX_SLOPE * MAP_UNIT
KNOWN = torch.tensor([[7.0, -2.0, 3.0, 1.0], [-5.0, 1.5, -1.0, -4.0]])
WHITE = torch.full((3, 64, 64), 255, dtype=torch.uint8)
TILES = [render_tile(0, 64), render_tile(1, 128, LABS["lab_b"]), render_tile(2, 256, LABS["lab_c"])]


def fade(lightness):
    return np.minimum((97 - lightness) / 37, (lightness - 5) / 5).clip(0, 1)


class Known(ColorNormNet):
    """Predicts just what a map does to each color: w B z."""

    def __init__(self, color_map, preserve_white):
        super().__init__()
        self.color_map, self.preserve_white = color_map, preserve_white

    def forward(self, lab):
        distance = torch.einsum("ij,njyx->niyx", self.color_map, color_terms(lab))
        if self.preserve_white:
            distance = distance * torch.from_numpy(fade(lab[:, :1].numpy()))
        return torch.cat([torch.zeros_like(distance[:, :1]), distance], dim=1)


def normalize_by(network, preserve_white=True, **options):
    """A NormalizeStain whose network is not a ColorNormNet alone."""
    normalize = NormalizeStain(ColorNormNet(), preserve_white, **options)
    normalize.network = network
    return normalize


def affine_network(color_map):
    """A ColorNormNet that predicts B z: it hands Lab on, far above the knees of its leaky ReLUs."""
    network = ColorNormNet().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        one = torch.eye(3)
        network.stem.weight[:, :, 1, 1] = one
        network.stem.bias.fill_(10)
        for block in network.blocks:
            convolution, _, norm = block.transition
            convolution.weight[:, :3, 0, 0] = one
            norm.weight.fill_(math.sqrt(1 + norm.eps))
        offset, *slopes = color_map.unbind(1)
        weight = torch.stack([1.25 * slopes[0], *slopes[1:]], dim=1)
        network.head.weight[1:, :, 1, 1] = weight / 20
        at_zero = offset - 0.5 * slopes[0] - slopes[1] + 0.6 * slopes[2]
        network.head.bias[1:] = (at_zero - 10 * weight.sum(dim=1)) / 20
    return network


def sums_by_numpy(z, share, weight, output):
    """Of pixels with z (N, 3), shares and weights (N,) and outputs (N, 2)."""
    terms = share[:, None] * np.column_stack([np.ones(len(z)), z])
    return (weight[:, None] * np.column_stack([terms, output])).T @ terms / len(z)


def ridge_by_numpy(z, share, weight, output):
    """The map by least squares, with rows of a penalty for the slopes, and the mean of z and of the offset."""
    terms = share[:, None] * np.column_stack([np.ones(len(z)), z])
    total = (weight * share**2).sum()
    penalty = np.sqrt(RIDGE * total) * np.eye(4)[1:]
    root = np.sqrt(weight)[:, None]
    rows, targets = np.concatenate([root * terms, penalty]), np.concatenate([root * output, np.zeros((3, 2))])
    color_map = np.linalg.lstsq(rows, targets, rcond=None)[0].T
    mean = (weight * share**2) @ z / total
    offset = (weight * share) @ output / total
    np.testing.assert_allclose(color_map @ [1, *mean], offset, atol=1e-8)
    return color_map, mean, offset


def bounded_by_numpy(color_map, mean, offset):
    slopes = color_map[:, 1:].copy()
    for columns in (slice(0, 1), slice(1, 3)):
        slopes[:, columns] *= min(1.0, LIMIT / np.linalg.norm(slopes[:, columns]))
    return np.column_stack([offset - slopes @ mean, slopes])


def pixels(seed, count=40, size=1.0):
    """Random colors, correlated as those of tissue are, and what a network may say of them."""
    random = np.random.default_rng(seed)
    z = random.normal(size=(count, 3)) @ random.normal(size=(3, 3)) * random.uniform(0.02, 1) + random.normal(size=3)
    share, weight = random.uniform(0.05, 1, count), random.uniform(0, 1, count)
    slopes = size * random.normal(size=(2, 3))
    output = share[:, None] * (10 * random.normal(size=2) + z @ slopes.T + random.normal(size=(count, 2)))
    return z, share, weight, output


@given(seed=st.integers(0, 10**6), size=st.floats(0.1, 30))
@settings(max_examples=40, deadline=None)
def test_a_map_is_ridge_regression_with_bounded_slopes(seed, size):
    of_pixels = pixels(seed, size=size)
    sums = torch.from_numpy(sums_by_numpy(*of_pixels))
    color_map, mean, offset = ridge_by_numpy(*of_pixels)
    expected = bounded_by_numpy(color_map, mean, offset)
    np.testing.assert_allclose(map_of(sums).numpy(), expected, atol=1e-7, rtol=1e-7)
    np.testing.assert_allclose(map_of(sums.float()).numpy(), expected, atol=0.02, rtol=1e-3)
    np.testing.assert_allclose(offset_of(sums).numpy(), offset, atol=1e-9)
    np.testing.assert_allclose(mean_terms(sums).numpy(), [1, *mean], atol=1e-9)
    np.testing.assert_allclose(map_of(sums, slopes=False).numpy(), as_map(torch.from_numpy(offset)).numpy(), atol=1e-9)
    slopes = map_of(sums)[:, 1:]
    assert max(slopes[:, 0].norm(), slopes[:, 1:].norm()) <= LIMIT * (1 + 1e-9)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_sums_of_parts_add_up_and_only_their_proportion_counts(seed):
    of_pixels = pixels(seed)
    whole = torch.from_numpy(sums_by_numpy(*of_pixels))
    parts = [
        torch.from_numpy(sums_by_numpy(*(values[part] for values in of_pixels)))
        for part in (slice(0, 10), slice(10, 15), slice(15, 40))
    ]
    joined = 10 * parts[0] + 5 * parts[1] + 25 * parts[2]
    torch.testing.assert_close(map_of(joined), map_of(whole))
    torch.testing.assert_close(map_of(1e-4 * whole), map_of(whole))
    batch = torch.stack([*parts, torch.zeros(6, 4, dtype=torch.float64)]).view(2, 2, 6, 4)
    for function, shape in ((map_of, (2, 4)), (offset_of, (2,)), (mean_terms, (4,))):
        each = [function(part) for part in batch.flatten(0, 1)]
        torch.testing.assert_close(function(batch), torch.stack(each).view(2, 2, *shape))


def test_without_tissue_everything_is_zero():
    for dtype in (torch.float32, torch.float64):
        nothing = torch.zeros(3, 6, 4, dtype=dtype)
        assert torch.equal(map_of(nothing), torch.zeros(3, 2, 4, dtype=dtype))
        assert torch.equal(map_of(nothing, slopes=False), torch.zeros(3, 2, 4, dtype=dtype))
        assert torch.equal(offset_of(nothing), torch.zeros(3, 2, dtype=dtype))
        assert torch.equal(mean_terms(nothing), torch.tensor([1.0, 0, 0, 0], dtype=dtype).expand(3, 4))


def test_gradients_of_a_map_are_right_within_the_bound_and_at_it_and_finite_without_tissue():
    sums = torch.stack([torch.from_numpy(sums_by_numpy(*pixels(0, size=size))) for size in (1.0, 30.0)])
    assert map_of(sums)[0, :, 2:].norm() < 0.9 * LIMIT < 0.99 * map_of(sums)[1, :, 2:].norm()
    assert torch.autograd.gradcheck(map_of, sums.requires_grad_())
    nothing = torch.zeros(6, 4, requires_grad=True)
    map_of(nothing).sum().backward()
    assert nothing.grad.isfinite().all()


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_slopes_go_to_zero_smoothly_where_colors_hardly_differ(seed):
    z, share, weight, output = pixels(seed)
    middle = z.mean(axis=0)
    plain = output / share[:, None]
    about = plain.mean(axis=0)

    def shrunk(spread):
        colors, says = middle + spread * (z - middle), share[:, None] * (about + spread * (plain - about))
        return map_of(torch.from_numpy(sums_by_numpy(colors, share, weight, says)))

    norms = [float(shrunk(spread)[:, 1:].norm()) for spread in np.linspace(1, 0, 51)]
    assert norms[-1] < 1e-9
    # The steepest that ridge regression can be, by the singular values of the colors.
    counts = weight * share**2
    mean = np.average(plain, weights=counts, axis=0)
    deviation = np.sqrt(np.average(((plain - mean) ** 2).sum(axis=1), weights=counts))
    assert max(abs(np.diff(norms))) <= 0.02 * 0.65 * deviation / np.sqrt(RIDGE)
    torch.testing.assert_close(shrunk(0.0) @ torch.tensor([1, *middle]), torch.from_numpy(about))
    # With the spread squared, once that is well below the ridge.
    near, far = (float(shrunk(spread)[:, 1:].norm()) for spread in (0.001, 0.002))
    assert far == pytest.approx(4 * near, rel=0.01, abs=1e-6)


def test_slopes_of_a_tile_go_to_zero_as_its_colors_become_one(monkeypatch):
    # Tissue without texture would not count.
    monkeypatch.setattr(estimate, "TISSUE_TEXTURE", 0.0)
    tile = render_tile(0) / 255
    mean = tile.mean(dim=(-1, -2), keepdim=True)
    normalize = NormalizeStain(affine_network(KNOWN), preserve_white=False)
    norms = []
    for spread in (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.02, 0.01):
        color_map = normalize.estimate_map(mean + spread * (tile - mean))
        norms.append(float(color_map[:, 1:].norm()))
    assert norms[0] > 2
    assert norms == sorted(norms, reverse=True)
    assert norms[-2] / norms[-1] == pytest.approx(4, rel=0.05)
    assert norms[-1] < 0.02
    at_the_mean = torch.einsum("ij,jyx->iyx", KNOWN, color_terms(rgb_to_lab(mean))).flatten()
    torch.testing.assert_close(color_map[:, 0], at_the_mean, atol=0.05, rtol=0)


def pixels_of(tiles, network, preserve_white):
    """Of the pixels that a network sees of tiles, in proportion to the tiles' areas: as for ``ridge_by_numpy``."""
    parts = []
    for tile in tiles:
        lab = rgb_to_lab(small_copy(tile[None]))
        weight = tissue_weight(lab)
        lightness, a, b = lab[0].double().flatten(1).numpy()
        z = np.column_stack([lightness - 60, a - 20, b + 12]) / 20
        weight = weight.double().flatten().numpy() * tile[0].numel() / weight.numel()
        share = fade(lightness) if preserve_white else np.ones_like(lightness)
        with torch.no_grad():
            output = network(lab)[0, 1:].double().flatten(1).numpy().T
        parts.append((z, share, weight, output))
    return [np.concatenate(values) for values in zip(*parts, strict=True)]


@BOTH
def test_the_map_of_an_image_is_the_fit_to_what_the_network_says_of_its_tissue(random_network, preserve_white):
    normalize = NormalizeStain(random_network, preserve_white)
    for tile in TILES:
        of_pixels = pixels_of([tile], normalize.network, preserve_white)
        sums = sums_by_numpy(*of_pixels) * len(of_pixels[0]) / tile[0].numel()
        np.testing.assert_allclose(tissue_sums(normalize.network, tile, preserve_white), sums, atol=1e-4, rtol=1e-4)
        expected = bounded_by_numpy(*ridge_by_numpy(*of_pixels))
        np.testing.assert_allclose(normalize.estimate_map(tile), expected, atol=2e-3)


@BOTH
def test_the_map_of_a_slide_is_the_fit_over_all_of_its_tiles(random_network, preserve_white):
    normalize = NormalizeStain(random_network, preserve_white)
    expected = bounded_by_numpy(*ridge_by_numpy(*pixels_of(TILES, normalize.network, preserve_white)))
    few = (TILES[0], WHITE, TILES[0].flip(-1))
    for tiles in (TILES, [*reversed(TILES), WHITE], [TILES[0][None], *TILES[1:]]):
        np.testing.assert_allclose(normalize.for_slide(tiles).fixed_map, expected, atol=2e-3)
    batched, listed = normalize.for_slide(torch.stack(few)), normalize.for_slide([*few])
    torch.testing.assert_close(batched.fixed_map, listed.fixed_map, atol=1e-4, rtol=0)
    offset = NormalizeStain(random_network, preserve_white, slopes=False).for_slide(TILES)
    assert offset.fixed_map[:, 1:].eq(0).all()
    mean = torch.from_numpy(ridge_by_numpy(*pixels_of(TILES, normalize.network, preserve_white))[2]).float()
    torch.testing.assert_close(offset.fixed_map[:, 0], mean, atol=1e-3, rtol=0)


@BOTH
def test_a_known_map_is_found_up_to_the_ridge(monkeypatch, preserve_white):
    network = Known(KNOWN, preserve_white)
    normalize = normalize_by(network, preserve_white)
    for tile in TILES:
        z, share, weight, _ = pixels_of([tile], network, preserve_white)
        mean = np.average(z, weights=weight * share**2, axis=0)
        covariance = np.cov(z.T, aweights=weight * share**2, ddof=0)
        slopes = KNOWN[:, 1:].double().numpy() @ covariance @ np.linalg.inv(covariance + RIDGE * np.eye(3))
        color_map = normalize.estimate_map(tile).double().numpy()
        np.testing.assert_allclose(color_map[:, 1:], slopes, atol=2e-3)
        # Whatever the ridge, nothing is missing at the mean color.
        at_the_mean = KNOWN.double().numpy() @ [1, *mean]
        np.testing.assert_allclose(color_map @ [1, *mean], at_the_mean, atol=1e-3)
        np.testing.assert_allclose(normalize.estimate_offset(tile), [0, *at_the_mean], atol=1e-3)
    monkeypatch.setattr(estimate, "RIDGE", 1e-5)
    for tile in TILES:
        torch.testing.assert_close(normalize.estimate_map(tile), KNOWN, atol=0.1, rtol=0)


@BOTH
def test_an_offset_is_what_a_map_does_to_the_mean_color_of_the_tissue(random_network, preserve_white):
    normalize = NormalizeStain(random_network, preserve_white)
    images = torch.stack([render_tile(seed, 64) for seed in range(3)])
    images[1] = 255
    means = []
    for image in images:
        z, share, weight, _ = pixels_of([image], normalize.network, preserve_white)
        counts = weight * share**2
        means.append(np.average(z, weights=counts, axis=0) if counts.any() else np.zeros(3))
    terms = torch.tensor(np.column_stack([np.ones(3), means])).float()
    fixed = normalize.with_map(KNOWN)
    for transform, maps in ((normalize, normalize.estimate_map(images)), (fixed, KNOWN.expand(3, 2, 4))):
        assert torch.equal(transform.estimate_map(images), maps)
        expected = torch.einsum("nij,nj->ni", maps, terms)
        offsets = transform.estimate_offset(images)
        torch.testing.assert_close(offsets[:, 1:], expected, atol=1e-3, rtol=0)
        assert offsets[:, 0].eq(0).all()
    assert normalize.estimate_offset(WHITE).tolist() == [0, 0, 0]
    assert fixed.estimate_offset(WHITE).tolist() == [0, *KNOWN[:, 0].tolist()]


def test_without_slopes_a_map_is_the_offset_at_the_mean_color(random_network):
    with_slopes, without = (NormalizeStain(random_network, slopes=slopes) for slopes in (True, False))
    images = torch.stack([render_tile(seed, 64) for seed in range(3)])
    images[1] = 255
    color_maps = without.estimate_map(images)
    assert with_slopes.estimate_map(images)[::2, :, 1:].ne(0).all()
    assert color_maps[..., 1:].eq(0).all()
    torch.testing.assert_close(color_maps[..., 0], with_slopes.estimate_offset(images)[:, 1:], atol=1e-4, rtol=0)
    assert torch.equal(without(images), shift_ab(images, -color_maps[..., 0]))
    assert without.with_map(KNOWN).fixed_map.equal(KNOWN)


def test_an_affine_network_is_one():
    lab = torch.rand(2, 3, 9, 7) * torch.tensor([100.0, 80.0, 80.0]).view(3, 1, 1) - torch.tensor([0, 40.0, 40]).view(
        3, 1, 1
    )
    expected = torch.einsum("ij,njyx->niyx", KNOWN, color_terms(lab))
    torch.testing.assert_close(affine_network(KNOWN)(lab)[:, 1:], expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_what_a_map_did_to_a_tile_is_undone(seed):
    """By a network that knows how far each color was moved."""
    tile = render_tile(seed, 128).double() / 255
    changed = shift_ab(tile, KNOWN.double(), preserve_white=False)
    step = torch.eye(4)
    step[2:] += KNOWN / 20
    network = affine_network(KNOWN @ step.inverse())
    tissue = (tissue_weight(rgb_to_lab(tile[None])) > 0)[0, 0]
    errors = []
    for slopes in (True, False):
        restored = NormalizeStain(network, preserve_white=False, slopes=slopes)(changed)
        difference = (rgb_to_lab(restored) - rgb_to_lab(tile))[1:, tissue]
        errors.append(float(difference.square().sum(dim=0).mean().sqrt()))
    moved = (rgb_to_lab(changed) - rgb_to_lab(tile))[1:, tissue].norm(dim=0).mean()
    assert moved > 5
    assert errors[0] < 0.3
    assert errors[0] < 0.2 * errors[1]


def test_gradients_pass_an_estimate_of_images_with_tissue_and_without(random_normalize):
    image = torch.stack([render_tile(0, 64), torch.full_like(WHITE, 252), torch.full_like(WHITE, 3)]) / 255
    image.requires_grad_()
    (random_normalize(image) ** 2).sum().backward()
    assert image.grad.isfinite().all()
    assert image.grad[0].ne(0).any()
    torch.testing.assert_close(image.grad[1:], 2 * image.detach()[1:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 40), (2, 2), (5, 5), (8, 40)])
@BOTH
def test_of_however_little_tissue_a_map_is_bounded(random_network, size, preserve_white):
    normalize = NormalizeStain(random_network, preserve_white)
    for seed in range(3):
        image = render_tile(seed, 64)[:, : size[0], : size[1]]
        for small in (image, image / 255):
            color_map = normalize.estimate_map(small)
            assert color_map.shape == (2, 4)
            assert color_map.isfinite().all()
            assert max(color_map[:, 1].norm(), color_map[:, 2:].norm()) <= LIMIT * (1 + 1e-5)
            assert normalize(small).shape == small.shape
        if size == (1, 1):
            assert color_map.eq(0).all()


def test_a_corner_of_tissue_in_glass_is_none(random_normalize):
    """Less than 2 % of the image."""
    image = torch.full((3, 128, 128), 255, dtype=torch.uint8)
    image[:, :12, :12] = render_tile(0)[:, 40:52, 40:52]
    assert random_normalize.estimate_map(image).eq(0).all()
    assert torch.equal(random_normalize(image), image)
    image[:, :40, :40] = render_tile(0)[:, 40:80, 40:80]
    assert random_normalize.estimate_map(image).ne(0).all()


def test_an_image_of_nan_has_no_map(random_normalize):
    image = torch.full((3, 32, 32), torch.nan)
    assert random_normalize.estimate_map(image).eq(0).all()
    assert random_normalize(image).isnan().all()
