import gc
import weakref

import pytest
import torch
from kornia.color import rgb_to_lab
from render_tiles import render_tile
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform import TrainConfig
from stainnorm_transform.color import MAP_UNIT, MAX_SLOPE, shift_ab
from stainnorm_transform.training.crops import (
    CROPS_PER_IMAGE,
    Batch,
    _DatasetCrops,
    batches,
    each_image,
    random_maps,
    to_tensor,
)

CONFIG = TrainConfig(iterations=4, batch_size=8, crop=32, scales=(1.0, 2.0))
WHITE = torch.full((3, 64, 64), 255, dtype=torch.uint8)


class Stream(IterableDataset):
    """Gives samples in order, as often as it is asked to."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


class Rendered(Dataset):
    """Renders its tiles when they are read, and knows which of them are still in memory."""

    def __init__(self, count):
        self.count = count
        self.reads = []
        self.alive = weakref.WeakSet()

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        tile = render_tile(index, 64)
        self.reads.append(index)
        self.alive.add(tile)
        return tile


@pytest.fixture(scope="module")
def tiles():
    return [render_tile(seed, 64 + 16 * seed) for seed in range(5)]


def same(first, second):
    return all(torch.equal(*values) for pair in zip(first, second, strict=True) for values in zip(*pair, strict=True))


@pytest.mark.parametrize("kind", [list, Stream])
def test_batches_go_on_from_any_number_and_split_into_parts(tiles, kind):
    whole = list(batches(kind(tiles), CONFIG, 0))
    assert len(whole) == 4
    assert same(whole[2:], batches(kind(tiles), CONFIG, 2))
    parts = [list(batches(kind(tiles), CONFIG, 0, part=(index, 2))) for index in range(2)]
    joined = [Batch(*map(torch.cat, zip(*pair, strict=True))) for pair in zip(*parts, strict=True)]
    assert same(whole, joined)
    assert not same(whole, batches(kind(tiles), TrainConfig(**{**vars(CONFIG), "seed": 1}), 0))


def test_the_number_of_workers_changes_nothing(tiles):
    assert same(batches(tiles, CONFIG, 0), batches(tiles, CONFIG, 0, workers=2))


def test_crops_maps_and_weights(tiles):
    for batch in batches(tiles, CONFIG, 0):
        assert batch.crops.shape == (8, 3, 32, 32)
        assert batch.crops.dtype == torch.float32
        assert batch.weight.shape == (8, 1, 32, 32)
        assert batch.shift.shape == (8, 2, 4)
        assert batch.jitter.shape == (8, 2)
        limits = torch.tensor([CONFIG.contrast_jitter, CONFIG.darkness_jitter])
        assert (batch.jitter.log().abs() <= limits + 1e-6).all()
        assert (batch.jitter.std(dim=0) > limits / 4).all()
        lightness = rgb_to_lab(batch.crops)[:, :1]
        assert ((lightness < 88) | (batch.weight == 0)).all()
        assert ((batch.weight > 0).float().mean(dim=(1, 2, 3)) >= CONFIG.min_tissue).all()


def test_offsets_are_uniform_and_spread_evenly_over_a_batch():
    config = TrainConfig(batch_size=20, max_offset=40.0)
    offsets = torch.stack([random_maps(config, number)[..., 0] for number in range(200)])
    assert offsets.shape == (200, 20, 2)
    strata = ((offsets + 40) / 4).floor().long()
    assert torch.equal(strata.sort(dim=1).values, torch.arange(20)[:, None].expand(200, 20, 2))
    assert offsets.mean(dim=1).abs().max() < 1
    within = (offsets + 40) / 4 - strata
    assert within.mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.corrcoef(offsets.reshape(-1, 2).T)[0, 1].abs() < 0.05
    assert not torch.equal(offsets[0], offsets[1])


def test_slopes_are_random_and_bounded_and_none_where_offsets_are_trained_for():
    config = TrainConfig(batch_size=20, slope=0.2)
    maps = torch.cat([random_maps(config, number) for number in range(100)])
    slopes = maps[..., 1:] / MAP_UNIT
    assert slopes[..., 1:].flatten(1).norm(dim=1).max() <= MAX_SLOPE * (1 + 1e-6)
    assert slopes[..., 0].norm(dim=1).max() <= MAX_SLOPE * (1 + 1e-6)
    expected = torch.tensor([[0.2 * 5 / 6, 0.2, 0.2 * 2 / 3], [0.2 * 5 / 6, 0.2 * 2 / 3, 0.2]])
    # The bound cuts a little.
    torch.testing.assert_close(slopes.std(dim=0), expected, rtol=0.1, atol=0)
    assert slopes.mean(dim=0).abs().max() < 0.02
    assert maps.flatten(1).T.corrcoef().fill_diagonal_(0).abs().max() < 0.1
    assert maps.flatten(1).unique(dim=0).shape == (2000, 8)
    offsets = random_maps(TrainConfig(batch_size=20, slope=0), 7)
    assert offsets[..., 1:].eq(0).all()
    assert torch.equal(offsets[..., 0], random_maps(config, 7)[..., 0])
    assert torch.equal(random_maps(config, 7), maps[140:160])


def test_images_of_any_size_are_drawn_equally_often():
    small = render_tile(0, 64)
    large = shift_ab(render_tile(1, 256), torch.tensor([0.0, 40.0]), preserve_white=False)
    crops = _DatasetCrops([small, large], CONFIG)
    yellow = [bool(rgb_to_lab(crops[CROPS_PER_IMAGE * group].image)[2].mean() > 0) for group in range(200)]
    assert 70 < sum(yellow) < 130


def test_an_image_is_read_once_for_its_crops_and_then_forgotten():
    images = Rendered(1000)
    list(batches(images, CONFIG, 0))
    crops = CONFIG.iterations * CONFIG.batch_size
    assert crops // CROPS_PER_IMAGE <= len(images.reads) <= 1.5 * crops // CROPS_PER_IMAGE
    gc.collect()
    assert len(images.alive) <= 1


def test_samples_of_every_kind_give_the_same_crops(tiles):
    square = [tile[:, :64, :64] for tile in tiles]
    expected = list(batches(square, CONFIG, 0))
    assert same(expected, batches([(to_pil_image(tile), 0) for tile in square], CONFIG, 0))
    assert same(expected, batches(torch.stack(square), CONFIG, 0))
    assert same(expected, batches([{"image": tile, "x": 3} for tile in square], CONFIG, 0))
    streamed = list(batches(Stream(square), CONFIG, 0))
    assert same(streamed, batches(DataLoader(square, batch_size=2), CONFIG, 0))
    assert same(streamed, batches(Stream([(tile, "label") for tile in square]), CONFIG, 0))
    assert same(streamed, batches(DataLoader([{"x": 3, "image": tile} for tile in square], 2), CONFIG, 0))
    assert [image.shape for image in each_image(DataLoader(square, batch_size=2))] == [(3, 64, 64)] * 5


def test_images_without_tissue_are_passed_over(tiles):
    for kind in (list, Stream):
        (batch, *_) = batches(kind([WHITE, tiles[0], WHITE]), CONFIG, 0)
        assert ((batch.weight > 0).float().mean(dim=(1, 2, 3)) >= CONFIG.min_tissue).all()


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "at least one image, got none"),
        (Stream([]), ValueError, "at least one image, got none"),
        ({0: WHITE}, TypeError, "a dataset of images, got dict"),
        ("tiles", TypeError, "a dataset of images, got str"),
        ([WHITE], ValueError, "no crop with 30% tissue .* in 100 images drawn from 1"),
        ([torch.full_like(WHITE, 90)], ValueError, "no crop with 30% tissue"),
        (Stream([WHITE]), ValueError, "no crop with 30% tissue .* in 1 images"),
        ([torch.zeros(3, 20, 64)], ValueError, "at least 32 x 32 pixels, got 20 x 64"),
        ([torch.zeros(4, 64, 64)], ValueError, r"shape \(\.\.\., 3, H, W\)"),
        ([torch.zeros(1, 3, 64, 64)], ValueError, r"images of shape \(3, H, W\), got \(1, 3, 64, 64\)"),
        ([to_pil_image(WHITE).convert("L")], ValueError, "mode RGB, got L"),
        (["tile.png"], TypeError, "expected a tensor, got str"),
        ([{"x": 3, "label": 1}], TypeError, "a dict with an image under 'image', got the keys 'x', 'label'"),
        ([torch.zeros(3, 64, 64, dtype=torch.int64)], TypeError, "got torch.int64"),
    ],
)
def test_bad_images(images, error, message):
    with pytest.raises(error, match=message):
        list(batches(images, CONFIG, 0))


def test_a_generator_is_refused(tiles):
    with pytest.raises(TypeError, match=r"can be read again, .* not a generator"):
        list(batches((tile for tile in tiles), CONFIG, 0))


def test_long_stretches_without_tissue_are_passed_over(tiles, monkeypatch):
    monkeypatch.setattr("stainnorm_transform.training.crops.PLACES", 1)
    config = TrainConfig(iterations=2, batch_size=4, crop=32, scales=(1.0, 1.0))
    assert len(list(batches(Stream([tiles[0][:, :40, :40], *[WHITE[:, :32, :32]] * 101]), config, 0))) == 2


@pytest.mark.parametrize("crop", [32, 111])
def test_the_number_of_threads_changes_nothing(crop):
    config = TrainConfig(iterations=1, batch_size=2, crop=crop, scales=(1.0, 1.0))
    images = [render_tile(1, 128)]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(list(batches(images, config, 0)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert same(*results)


def test_to_tensor_takes_the_image_of_a_sample(tiles):
    assert torch.equal(to_tensor((to_pil_image(tiles[0]), 3, "label")), tiles[0])
