"""The tissue of a slide as a dataset."""

import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from synthetic import damage, make_slide, on_glass, tissue
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2.functional import pil_to_tensor

from stainnorm_transform import TrainConfig, train
from stainnorm_transform.slides import Slide, SlideTiles, slide_normalizer
from stainnorm_transform.slides.dataset import OPEN_SLIDES


def test_tiles_are_those_of_the_slide_in_its_normalized_colors(tmp_path, normalize):
    pixels = on_glass(tissue(512, 768), 1024, 1280)
    path = make_slide(tmp_path / "a.svs", pixels)
    tiles = SlideTiles(path, normalize, side=256)
    assert tiles.corners == [(x, y) for y in (256, 512) for x in (256, 512, 768)]
    with Slide(path) as slide:
        fixed = slide_normalizer(slide, normalize).normalize
    assert torch.equal(tiles.normalize.fixed_map, fixed.fixed_map)
    for index, (x, y) in enumerate(tiles.corners):
        item = tiles[index]
        assert (item["x"], item["y"], item["level"]) == (x, y, 0)
        assert torch.equal(item["image"], fixed(torch.from_numpy(pixels[y : y + 256, x : x + 256]).permute(2, 0, 1)))
    raw = SlideTiles(path, None, side=256)[0]["image"]
    assert np.array_equal(raw.permute(1, 2, 0).numpy(), pixels[256:512, 256:512])


def test_tiles_are_taken_to_train_and_for_the_map_of_a_slide(slide_path, normalize):
    raw = SlideTiles(slide_path, None, side=200)
    images = [item["image"] for item in raw]
    loader = DataLoader(raw, batch_size=8, num_workers=1)
    config = TrainConfig(iterations=2, batch_size=4, report_every=2)
    expected = normalize.for_slide(images).fixed_map
    for given in (raw, loader):
        torch.testing.assert_close(normalize.for_slide(given).fixed_map, expected, atol=1e-3, rtol=0)
        streamed = given is loader
        network = train(given, config, held_out=Subset(raw, [0, 1]), report=lambda report: None)
        same = train(DataLoader(images, 8) if streamed else images, config, report=lambda report: None)
        assert all(map(torch.equal, network.state_dict().values(), same.state_dict().values()))


def test_tiles_of_another_level_or_resolution(slide_path, normalize):
    by_level = SlideTiles(slide_path, normalize, side=64, level=1)
    assert by_level[0]["level"] == 1
    by_mpp = SlideTiles(slide_path, normalize, side=64, mpp=2.0)
    assert by_mpp.corners == by_level.corners
    assert torch.equal(by_mpp[0]["image"], by_level[0]["image"])
    assert by_mpp.side_level0 == by_level.side_level0 == 256
    between = SlideTiles(slide_path, normalize, side=100, mpp=1.0)
    assert (between.level, between.side_level0) == (0, 200)
    assert between.corners[1] == (200, 0)
    assert between[0]["image"].shape == (3, 100, 100)
    with Slide(slide_path) as slide:
        whole = Image.fromarray(slide.read(200, 0, 200, 200).permute(1, 2, 0).numpy())
    small = pil_to_tensor(whole.resize((100, 100), Image.Resampling.BOX))
    assert (between[1]["image"].int() - between.normalize(small).int()).abs().float().mean() < 4


@pytest.mark.parametrize(
    ("workers", "context"), [(0, None), (2, "fork"), pytest.param(1, "spawn", marks=pytest.mark.slow)]
)
def test_tiles_go_through_a_data_loader(slide_path, normalize, workers, context):
    tiles = SlideTiles(slide_path, normalize, side=200)
    loader = DataLoader(tiles, batch_size=8, num_workers=workers, multiprocessing_context=context)
    batches = list(loader)
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), torch.stack([t["image"] for t in tiles]))
    assert torch.cat([batch["x"] for batch in batches]).tolist() == [x for x, _ in tiles.corners]
    assert batches[0]["level"].tolist() == [0] * 8


def first_tile(path, normalize):
    return SlideTiles(path, normalize, side=200)[0]["image"].numpy()


def test_a_pool_that_is_forked_after_an_estimate(slide_path, normalize, two_threads):
    """Torch in the parent has a thread that a fork does not copy."""
    expected = first_tile(slide_path, normalize)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply_async(first_tile, (slide_path, normalize)).get(60)
    # One thread may round other than two.
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_tiles_can_be_pickled(slide_path, normalize):
    tiles = SlideTiles(slide_path, normalize, side=200)
    assert torch.equal(pickle.loads(pickle.dumps(tiles))[3]["image"], tiles[3]["image"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 2}, "expected a level from 0 to 1, got 2"),
        ({"level": 1, "mpp": 0.5}, "expected a level or an mpp, got both"),
        ({"mpp": -1.0}, "expected micrometers a pixel above 0, got -1.0"),
        ({"side": 0}, "expected a side of 1 pixel or more, got 0"),
        ({"mpp": 0.25}, "expected mpp as large as that of the slide, 0.5, or larger, got 0.25"),
        ({"min_tissue": 2}, r"expected a share of tissue in \[0, 1\], got 2"),
    ],
)
def test_tiles_that_cannot_be_are_refused(slide_path, options, message):
    with pytest.raises(ValueError, match=message):
        SlideTiles(slide_path, None, **options)


def test_no_resolution_means_no_mpp(tmp_path):
    path = make_slide(tmp_path / "a.svs", tissue(300, 300), mpp=None)
    with pytest.raises(ValueError, match="does not say its resolution: choose a level instead"):
        SlideTiles(path, None, mpp=0.5)


def test_tiles_are_whole_and_all_of_them_if_asked(slide_path):
    tiles = SlideTiles(slide_path, None, side=400, min_tissue=0)
    assert tiles.corners == [(x, y) for y in (0, 400) for x in (0, 400, 800)]
    assert len(SlideTiles(slide_path, None, side=1200, min_tissue=0)) == 0


def test_tiles_have_as_much_tissue_as_asked(tmp_path):
    pixels = np.full((256, 1024, 3), 245, np.uint8)
    for index, share in enumerate((0.1, 0.4, 0.6, 1)):
        pixels[:, index * 256 : index * 256 + int(256 * share)] = tissue(256, int(256 * share))
    path = make_slide(tmp_path / "a.svs", pixels)
    found = {share: len(SlideTiles(path, None, side=256, min_tissue=share)) for share in (0.25, 0.5, 0.8)}
    assert found == {0.25: 3, 0.5: 2, 0.8: 1}


def test_damage_names_the_slide(tmp_path):
    path = make_slide(tmp_path / "a.svs", tissue(1100, 1500))
    damage(path)
    tiles = SlideTiles(path, None, side=240)
    with pytest.raises(ValueError, match=f"{path}: damaged at x = 720, y = 0"):
        tiles[tiles.corners.index((720, 0))]


def test_a_blank_slide_has_no_tiles(tmp_path, normalize):
    path = make_slide(tmp_path / "a.svs", np.full((600, 700, 3), 243, np.uint8))
    assert len(SlideTiles(path, normalize)) == 0


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="run on Linux: open files are counted")
@pytest.mark.parametrize("ome", [False, True])
def test_many_slides_do_not_stay_open(tmp_path, ome):
    pixels = tissue(512, 512)
    if ome:
        made = [tmp_path / f"{number}.ome.tif" for number in range(12)]
        for path in made:
            tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", metadata={"axes": "YXS"})
    else:
        made = [make_slide(tmp_path / f"{number}.svs", pixels) for number in range(12)]
    tiles = [SlideTiles(path, None, side=256, min_tissue=0) for path in made]
    before = len(os.listdir("/proc/self/fd"))
    images = [dataset[0]["image"] for _ in range(2) for dataset in tiles]
    assert len(os.listdir("/proc/self/fd")) - before <= OPEN_SLIDES
    assert all(torch.equal(image, images[0]) for image in images)


def test_a_slide_that_was_replaced_is_read_anew(tmp_path, monkeypatch):
    pixels = tissue(256, 256)
    path = make_slide(tmp_path / "a.svs", pixels)
    monkeypatch.chdir(tmp_path)
    before = SlideTiles("a.svs", None, side=256, min_tissue=0)
    assert np.array_equal(before[0]["image"].permute(1, 2, 0), pixels)
    os.replace(make_slide(tmp_path / "b.svs", 255 - pixels), path)
    os.utime(path, ns=(1, 1))  # a coarse clock may give both the same time
    after = SlideTiles("a.svs", None, side=256, min_tissue=0)
    assert np.array_equal(after[0]["image"].permute(1, 2, 0), 255 - pixels)
    with pytest.raises(ValueError, match=r"a\.svs: the file has changed since this dataset was made: make it again"):
        before[0]


def test_relative_paths_are_those_of_when_the_dataset_was_made(tmp_path, monkeypatch):
    pixels = {"x": tissue(256, 256), "y": 255 - tissue(256, 256)}
    made = {}
    for name, each in pixels.items():
        make_slide(tmp_path / name / "a.svs", each)
        monkeypatch.chdir(tmp_path / name)
        made[name] = SlideTiles("a.svs", None, side=256, min_tissue=0)
    for name, each in pixels.items():
        assert np.array_equal(made[name][0]["image"].permute(1, 2, 0), each)
