import pytest
import torch
from camelyon17 import read
from kornia.color import rgb_to_lab
from render_tiles import render_tile

from stainnorm_transform import ColorNormNet, NormalizeStain, weights
from stainnorm_transform.estimate import (
    map_of,
    offset_of,
    small_copy,
    sums_of_copies,
    tissue_sums,
    tissue_weight,
)

NO_TISSUE = [
    "no-tissue.png",
    "no-tissue2.png",
    "no-tissue-line.png",
    "no-tissue-green-pen.png",
    "no-tissue-red-pen.png",
]
NO_TISSUE += ["almost-white-1.png", "almost-white-ihc.png", "liver-level2-38626-13514-39426-14315.png"]
TISSUE = ["almost-white-2.png", "high-nuclei-score-level2.png", "low-nuclei-score-level0.png"]
TISSUE += ["very-low-nuclei-score-level0.png", "kidney-ihc-level0-350-530-360-540.png"]


def tissue_share(image: torch.Tensor) -> float:
    return (tissue_weight(rgb_to_lab(small_copy(image[None]))) > 0).float().mean().item()


@pytest.mark.parametrize("name", NO_TISSUE)
def test_blank_tiles_and_pen_come_back_unchanged(data, random_normalize, name):
    image = read(data / "edge_cases" / name)
    assert random_normalize.estimate_offset(image).eq(0).all()
    assert random_normalize.estimate_map(image).eq(0).all()
    assert torch.equal(random_normalize(image), image)


@pytest.mark.parametrize("name", TISSUE)
def test_little_or_pale_tissue_is_still_tissue(data, random_normalize, name):
    assert random_normalize.estimate_offset(read(data / "edge_cases" / name))[1:].ne(0).all()


def test_almost_all_of_real_tissue_counts(data):
    for center in range(5):
        for path in (data / "camelyon17" / f"center_{center}").iterdir():
            assert tissue_share(read(path)) > 0.7, path


@pytest.mark.parametrize("value", [0, 128, 255])
def test_images_of_one_color_have_no_tissue(random_normalize, value):
    for size in ((1, 1), (3, 500), (64, 64)):
        image = torch.full((3, *size), value, dtype=torch.uint8)
        assert random_normalize.estimate_offset(image).tolist() == [0, 0, 0]
        assert random_normalize.estimate_map(image).tolist() == [[0] * 4] * 2
        assert torch.equal(random_normalize(image), image)


def test_glass_and_black_do_not_count_and_dark_tissue_counts_more(tile):
    lab = rgb_to_lab(tile[None] / 255)
    weight = tissue_weight(lab)
    assert weight[lab[:, :1] > 88].eq(0).all()
    lightness, weights = lab[:, 0].flatten(), weight.flatten()
    assert weights[lightness < 40].mean() > 2 * weights[(lightness > 50) & (lightness < 80)].mean() > 0
    tissue = weights > 0
    torch.testing.assert_close(weights[tissue], (88 - lightness[tissue]) / 78, atol=1e-5, rtol=0)
    assert tissue_weight(rgb_to_lab(tile[None] / 255 * 0.05)).eq(0).all()


@pytest.mark.parametrize("preserve_white", [True, False])
def test_the_mean_is_over_the_tissue(tile, preserve_white):
    class Ramp(ColorNormNet):
        """Predicts a* = column, b* = L*."""

        def forward(self, lab):
            column = torch.arange(lab.shape[-1]).float().expand_as(lab[:, :1])
            return torch.cat([torch.zeros_like(column), column, lab[:, :1]], dim=1)

    halves = (tile / 255).unflatten(-1, (64, 2)).unflatten(-3, (64, 2)).mean(dim=(-1, -3))
    lab = rgb_to_lab(halves)
    weight, lightness = tissue_weight(lab[None])[0, 0].double(), lab[0]
    share = torch.ones_like(lightness)
    if preserve_white:
        share = torch.minimum((97 - lightness) / 37, (lightness - 5) / 5).clamp(0, 1)
    # Of an offset, a pixel shows its share, and counts by it.
    expected = [(weight * share * output).sum() / (weight * share**2).sum() for output in (torch.arange(64), lightness)]
    estimate = offset_of(tissue_sums(Ramp(), tile, preserve_white))
    torch.testing.assert_close(estimate.double(), torch.stack(expected), atol=1e-4, rtol=0)
    normalize = NormalizeStain(ColorNormNet(), preserve_white)
    normalize.network = Ramp()
    torch.testing.assert_close(normalize.estimate_offset(tile), torch.tensor([0.0, *estimate]), atol=1e-4, rtol=0)
    assert normalize.estimate_offset(tile)[0] == 0


def test_large_images_are_seen_as_small_copies():
    assert small_copy(torch.zeros(1, 3, 1024, 512)).shape == (1, 3, 64, 32)
    assert small_copy(torch.zeros(1, 3, 5000, 100)).shape == (1, 3, 800, 16)
    assert small_copy(torch.zeros(1, 3, 5000, 2)).shape == (1, 3, 2500, 1)
    assert small_copy(torch.zeros(1, 3, 1100, 9000)).shape == (1, 3, 68, 562)
    assert small_copy(torch.zeros(1, 3, 1, 1)).shape == (1, 3, 1, 1)
    for size in (64, 100, 128, 256, 1024):
        scale = max(2, size // 64)
        blocks = torch.rand(1, 3, size, size)
        expected = torch.nn.functional.avg_pool2d(blocks, scale)
        torch.testing.assert_close(small_copy(blocks), expected)
    white = torch.full((1, 3, 1024, 1024), 255, dtype=torch.uint8)
    assert small_copy(white).eq(1).all()
    odd = torch.rand(1, 3, 200, 300)
    assert small_copy(odd).shape == (1, 3, 42, 64)
    square = torch.rand(1, 3, 300, 300)
    # As if every pixel were 16 x 16 smaller ones, of which 75 x 75 are one of the copy.
    finer = square.double().repeat_interleave(16, dim=-1).repeat_interleave(16, dim=-2)
    torch.testing.assert_close(small_copy(square), torch.nn.functional.avg_pool2d(finer, 75).float())
    # The rows come first, so those that fit whole do not depend on what is below them.
    torch.testing.assert_close(small_copy(square)[:, :, :42], small_copy(square[:, :, :200]))


def test_strips_are_seen_at_the_scale_of_their_field(data):
    """And the same when they are turned."""
    normalize = NormalizeStain.pretrained()
    for center in range(5):
        field = read(next((data / "camelyon17" / f"center_{center}").glob("*.jpeg")))
        expected = normalize.estimate_offset(field)
        for top in (0, 900, 1800):
            strip = field[:, top : top + 40]
            estimate = normalize.estimate_offset(strip)
            assert (estimate - expected).norm() < 6
            assert (estimate - normalize.estimate_offset(strip.mT.contiguous())).norm() < 1


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (300, 200), (1100, 1030)])
def test_bytes_and_floats_give_the_same_copy(size):
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    torch.testing.assert_close(small_copy(image), small_copy(image / 255), atol=1e-6, rtol=0)


def test_the_estimate_is_close_to_the_dense_one(data):
    normalize = NormalizeStain.pretrained()
    differences = []
    for center in range(5):
        for path in sorted((data / "camelyon17" / f"center_{center}").glob("tile*"))[:1]:
            image = read(path)
            difference = normalize.estimate_offset(image) - normalize.estimate_offset(image, dense=True)
            differences.append(float(difference.norm()))
    assert max(differences) < 0.3
    assert max(differences) > 0


@pytest.mark.parametrize(("size", "step"), [((64, 64), 2), ((256, 64), 4)])
def test_the_dense_estimate_begins_copies_at_every_pixel(size, step):
    network = weights.load().network
    image = render_tile(3, 256)[:, : size[0], : size[1]]
    sums, unweighted = 0, 0
    for top in range(step):
        for left in range(step):
            window = image[:, top:, left:]
            pixels = (window.shape[1] // step) * (window.shape[2] // step)
            of_window = sums_of_copies(network, small_copy(window[None], 64 * step))[0]
            sums += pixels * of_window
            unweighted += of_window
    assert (offset_of(unweighted) - offset_of(sums)).norm() > 5e-4
    normalize = NormalizeStain(network)
    offset = normalize.estimate_offset(image, dense=True)
    torch.testing.assert_close(offset, torch.tensor([0.0, *offset_of(sums)]), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalize.estimate_map(image, dense=True), map_of(sums), atol=1e-3, rtol=0)


def test_the_estimate_does_not_jump_by_one_more_pixel(data):
    """The scale of the copy grows with the image up to 1024 pixels."""
    normalize = NormalizeStain.pretrained()
    for path in sorted((data / "camelyon17/center_2").glob("tile*"))[:3]:
        tile = read(path)
        rows = torch.cat([tile, tile.flip(-1)], dim=-1)
        image = torch.cat([rows, rows.flip(-2)], dim=-2)
        for size in (128, 192, 256, 320, 512, 1024):
            less, same, more = (normalize.estimate_offset(image[:, :side, :side]) for side in range(size - 1, size + 2))
            assert max((less - same).norm(), (same - more).norm()) < 0.4, (path, size)


def test_nan_counts_as_glass(random_normalize):
    tile = render_tile() / 255
    holes = torch.rand(128, 128, generator=torch.Generator().manual_seed(0)) < 0.01
    with_nan, with_white = tile.clone(), tile.clone()
    with_nan[:, holes], with_white[:, holes] = torch.nan, 1.0
    torch.testing.assert_close(random_normalize.estimate_offset(with_nan), random_normalize.estimate_offset(with_white))
    torch.testing.assert_close(random_normalize.estimate_map(with_nan), random_normalize.estimate_map(with_white))
    assert torch.equal(random_normalize(with_nan).isnan(), holes.expand(3, -1, -1))


def test_a_map_that_was_estimated_without_gradients_can_be_used_with_them(tile, random_normalize):
    color_map = random_normalize.estimate_map(tile)
    factor = torch.ones(2, 4, requires_grad=True)
    (color_map * factor).square().sum().backward()
    torch.testing.assert_close(factor.grad, 2 * color_map**2)
    color_map += 1
    image = (tile / 255).requires_grad_()
    (random_normalize.estimate_map(image) * factor).sum().backward()
    assert image.grad.abs().sum() > 0


def test_what_a_hook_is_given_can_be_used_with_gradients(tile, random_normalize):
    kept = []
    handle = random_normalize.network.register_forward_hook(lambda module, inputs, output: kept.append(output))
    random_normalize.estimate_map(tile)
    handle.remove()
    factor = torch.ones((), requires_grad=True)
    (kept[0] * factor).sum().backward()
    torch.testing.assert_close(factor.grad, kept[0].sum())
