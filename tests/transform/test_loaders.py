"""Data loaders: every way to start workers, and what a fork copies."""

import multiprocessing
import threading
from functools import partial

import numpy as np
import pytest
import torch
from render_tiles import render_tile
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform import NormalizeStain, PerturbStain
from stainnorm_transform import transform as transform_module
from stainnorm_transform.color import shift_ab

COUNT = 6


class Tiles(Dataset):
    """(image, {mask, label}), transformed together, by each of some transforms in turn."""

    def __init__(self, *transforms):
        self.transforms = transforms

    def __len__(self):
        return COUNT * len(self.transforms)

    def __getitem__(self, index):
        number, index = divmod(index, COUNT)
        image = to_pil_image(render_tile(index, 48))
        rest = {"mask": tv_tensors.Mask(torch.full((48, 48), index)), "label": index}
        return self.transforms[number](image, rest)


class Stream(IterableDataset):
    def __init__(self, transform):
        self.transform = transform

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        yield from (self.transform(render_tile(index, 48)) for index in range(info.id, COUNT, info.num_workers))


def loading(normalize):
    return v2.Compose([normalize, v2.ToImage()])


@pytest.fixture(params=["per tile", "per slide"])
def normalize(request):
    normalize = NormalizeStain.pretrained()
    return normalize.for_slide([render_tile(0)]) if request.param == "per slide" else normalize


WAYS = [
    {"num_workers": 0},
    *({"num_workers": count, "multiprocessing_context": "fork"} for count in (1, 2)),
    {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True, "prefetch_factor": 3},
    {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True},
    pytest.param(
        {"num_workers": 1, "multiprocessing_context": "forkserver", "persistent_workers": True}, marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way.values())))
def test_every_way_gives_the_same_batches(way):
    """With a map for each tile, and with that of a slide."""
    per_tile = NormalizeStain.pretrained()
    per_slide = per_tile.for_slide([render_tile(0)])
    # A parent that has computed, with its threads, before it forks.
    per_tile(torch.stack([render_tile(index, 300) for index in range(2)]))
    expected = torch.stack([normalize(render_tile(i, 48)) for normalize in (per_tile, per_slide) for i in range(COUNT)])
    loader = DataLoader(Tiles(loading(per_tile), loading(per_slide)), batch_size=4, **way)
    for _ in range(2):
        batches = list(loader)
        assert torch.equal(torch.cat([images for images, _ in batches]), expected)
        numbers = torch.arange(COUNT).repeat(2)
        assert torch.equal(torch.cat([rest["mask"][:, 0, 0] for _, rest in batches]), numbers)
        assert torch.equal(torch.cat([rest["label"] for _, rest in batches]), numbers)


def test_iterable_datasets(normalize):
    loader = DataLoader(Stream(normalize), batch_size=None, num_workers=2, multiprocessing_context="fork")
    expected = torch.stack([normalize(render_tile(index, 48)) for index in range(COUNT)])
    assert torch.equal(torch.stack(list(loader)), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="run on a machine with a CUDA device")
def test_pinned_batches_go_to_the_device(normalize):
    loader = DataLoader(Tiles(loading(normalize)), batch_size=4, num_workers=1, pin_memory=True)
    images, _ = next(iter(loader))
    assert images.is_pinned()
    on_device = normalize.to("cuda")(images.to("cuda", non_blocking=True))
    torch.testing.assert_close(on_device.cpu(), normalize.to("cpu")(images), atol=1e-4, rtol=0)


def test_workers_draw_different_perturbations():
    loader = DataLoader(Tiles(loading(PerturbStain(20))), batch_size=3, num_workers=2, multiprocessing_context="fork")
    plain = torch.stack([render_tile(index, 48) for index in range(COUNT)])

    def draw(seed):
        torch.manual_seed(seed)
        return torch.cat([images for images, _ in loader])

    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    shifts = (first.float() - plain).mean(dim=(2, 3))
    assert len({tuple(shift.tolist()) for shift in shifts}) == COUNT


class OneTile(Dataset):
    """The same tile again and again, perturbed."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return PerturbStain(20)(render_tile(0, 16))


@pytest.mark.parametrize(
    "way",
    [
        {"multiprocessing_context": "fork"},
        {"multiprocessing_context": "fork", "persistent_workers": True},
        pytest.param({"multiprocessing_context": "spawn"}, marks=pytest.mark.slow),
        pytest.param({"multiprocessing_context": "spawn", "persistent_workers": True}, marks=pytest.mark.slow),
    ],
    ids=lambda way: " ".join(map(str, way.values())),
)
def test_workers_and_epochs_draw_differently_by_the_generator_of_the_loader(way):
    """By hand: of each worker, torch's generator has the seed that the loader drew, plus the number of the worker."""
    loader = DataLoader(OneTile(), batch_size=1, num_workers=2, generator=torch.Generator().manual_seed(3), **way)
    draws = [[image[0] for image in loader] for _ in range(2)]
    assert len({image.numpy().tobytes() for epoch in draws for image in epoch}) == 2 * COUNT

    seeds = torch.Generator().manual_seed(3)
    perturb, tile = PerturbStain(20), render_tile(0, 16)
    first, second = (int(torch.empty((), dtype=torch.int64).random_(generator=seeds)) for _ in range(2))
    for worker in range(2):
        torch.manual_seed(first + worker)
        assert all(torch.equal(image, perturb(tile)) for image in draws[0][worker::2])
        # A worker that stays goes on.
        if "persistent_workers" not in way:
            torch.manual_seed(second + worker)
        assert all(torch.equal(image, perturb(tile)) for image in draws[1][worker::2])


def test_without_workers_the_generator_of_the_loader_decides_no_color():
    def draw():
        return torch.cat(list(DataLoader(OneTile(), generator=torch.Generator().manual_seed(3))))

    torch.manual_seed(0)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(draw(), first)


def test_a_fork_while_another_thread_makes_a_table_does_not_hang(monkeypatch):
    """A worker copies the lock as it is held, by a thread that it does not copy."""
    slide = NormalizeStain.pretrained().for_slide([render_tile(0)])
    expected = slide(render_tile(0, 48))
    monkeypatch.setattr(transform_module, "TABLE_SIZE", 1000)
    began, end = threading.Event(), threading.Event()
    make = transform_module.shift_table

    def slowly(*arguments):
        began.set()
        end.wait()
        return make(*arguments)

    monkeypatch.setattr(transform_module, "shift_table", slowly)
    thread = threading.Thread(target=slide, args=(render_tile(1, 64),))
    thread.start()
    began.wait()
    try:
        loader = DataLoader(Tiles(loading(slide)), num_workers=1, multiprocessing_context="fork")
        assert torch.equal(next(iter(loader))[0][0], expected)
        # Nor does another thread wait.
        assert torch.equal(slide(render_tile(0, 48)), expected)
    finally:
        end.set()
        thread.join()


def test_threads_share_a_transform(normalize):
    tiles = [render_tile(seed, 64) for seed in range(8)]
    expected = [normalize(tile) for tile in tiles]
    found = {}

    def work(seed):
        for _ in range(5):
            found[seed] = normalize(tiles[seed])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(8))


def test_a_pool_that_is_forked_after_an_estimate(two_threads):
    """Torch in the parent has a thread that a fork does not copy."""
    tiles = [render_tile(seed, 128).repeat(1, 4, 4) for seed in range(2)]
    normalize = NormalizeStain.pretrained()
    slide = normalize.for_slide(tiles)
    operations = [
        normalize,
        slide,
        normalize.estimate_offset,
        normalize.estimate_map,
        PerturbStain(0.0),
        partial(map_of_slide, normalize),
        partial(shift_ab, shift=torch.tensor([5.0, -5.0])),
    ]
    expected = [operation(tiles[0]) for operation in operations]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for operation, before_the_fork in zip(operations, expected, strict=True):
            out = pool.apply_async(apply, (operation, tiles[0].numpy())).get(60)
            # One thread rounds other than two, by which a pixel may be rounded to the next level.
            levels = out.dtype == np.uint8
            difference = np.abs(out.astype(float) - before_the_fork.numpy())
            assert difference.max() <= (1 if levels else 1e-3)
            assert not levels or (difference > 0).mean() < 1e-4


def map_of_slide(normalize, tile):
    return normalize.for_slide([tile]).fixed_map


def apply(operation, tile):
    return operation(torch.from_numpy(tile)).numpy()
