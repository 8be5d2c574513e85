"""A slide that reads as its normalized copy."""

import multiprocessing
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openslide
import pytest
import torch
from openslide.deepzoom import DeepZoomGenerator
from synthetic import damage, make_slide, on_glass, swapped_profile, tissue, write_ome
from torchvision.transforms.v2.functional import pil_to_tensor

from stainnorm_transform import NormalizeStain
from stainnorm_transform.color import shift_ab
from stainnorm_transform.slides import NormalizedSlide, Slide, SlideFormat, normalized, slide_normalizer, write_slide

MAP = torch.tensor([[12.0, 1.5, 3.25, -0.5], [-15.0, 0.75, -1.0, 2.0]])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    pixels = on_glass(tissue(512, 768), 1100, 1500)
    return make_slide(tmp_path_factory.mktemp("normalized") / "a.svs", pixels)


@pytest.fixture(scope="module")
def written(path, normalize):
    """The file that is never written."""
    out = path.with_name("written.tif")
    with Slide(path) as slide:
        fixed = slide_normalizer(slide, normalize).normalize
        write_slide(slide, out, fixed, SlideFormat(quality=None), threads=2)
    return out


def regions(slide, level=0):
    """Inside, over every border, and outside."""
    for x, y in ((300, 200), (-50, -70), (1400, 1000), (1499, 3), (-300, -300), (5000, 200)):
        yield np.asarray(slide.read_region((x, y), level, (150, 130)))


def test_it_reads_as_the_slide_that_is_written_without_loss(path, written, normalize):
    with NormalizedSlide(path, normalize) as slide, openslide.OpenSlide(written) as expected:
        assert slide.dimensions == expected.dimensions
        for ours, theirs in zip(regions(slide), regions(expected), strict=True):
            assert np.array_equal(ours[..., 3], theirs[..., 3])
            # The file has one value more or less where its table rounds.
            difference = np.abs(ours.astype(int) - theirs)
            assert difference.max() <= 1
            assert difference.mean() < 1e-4
        assert slide.normalize.fixed_map.any()
        assert slide.tiles > 0


def test_what_outside_is_transparent_as_in_openslide_on_every_level(path, normalize):
    with NormalizedSlide(path, normalize) as slide, openslide.OpenSlide(path) as plain:
        assert slide.level_dimensions == plain.level_dimensions
        assert slide.level_downsamples == plain.level_downsamples
        for level in range(slide.level_count):
            for ours, theirs in zip(regions(slide, level), regions(plain, level), strict=True):
                # On the border of smaller levels, a pixel may be half outside.
                certain = (theirs[..., 3] == 0) | (theirs[..., 3] == 255)
                assert np.array_equal(ours[..., 3][certain], theirs[..., 3][certain])
                assert certain.mean() > 0.97
                image = torch.from_numpy(theirs[..., :3].copy()).permute(2, 0, 1)
                moved = slide.normalize(image).permute(1, 2, 0).numpy()
                inside = theirs[..., 3] == 255
                assert np.array_equal(ours[..., :3][inside], moved[inside])
        for downsample in (0.5, 1, 1.5, 3.99, 4, 4.1, 100):
            assert slide.get_best_level_for_downsample(downsample) == plain.get_best_level_for_downsample(downsample)


def test_large_slides_are_read_by_a_table(path, normalize, monkeypatch):
    fixed = normalize.with_map(MAP)
    with NormalizedSlide(path, fixed) as slide:
        assert slide.tiles is None
        expected = [*regions(slide)]
    monkeypatch.setattr(normalized, "TABLE_SIZE", 1)
    monkeypatch.setattr(normalized, "shift_pixels", None)
    monkeypatch.setattr("stainnorm_transform.transform.TABLE_SIZE", 1)
    with NormalizedSlide(path, fixed) as slide:
        for ours, theirs in zip(regions(slide), expected, strict=True):
            assert np.array_equal(ours, theirs)


def test_an_image_of_other_formats(tmp_path, normalize):
    pixels = tissue(600, 500)
    for path in (write_ome(tmp_path / "a.ome.tif", pixels), write_ome(tmp_path / "b.tif", pixels)):
        with NormalizedSlide(path, normalize.with_map(MAP)) as slide:
            region = slide.read_region((0, 0), 0, slide.dimensions)
            expected = shift_ab(torch.from_numpy(pixels).permute(2, 0, 1), -MAP)
            assert torch.equal(pil_to_tensor(region.convert("RGB")), expected)
            assert slide.properties["openslide.level[0].width"] == "500"
            assert slide.properties["openslide.level-count"] == "1"
            zoom = DeepZoomGenerator(slide)
            assert zoom.get_tile(zoom.level_count - 1, (0, 0)).size == (255, 255)


def test_deep_zoom_and_thumbnails_are_those_of_the_written_slide(path, written, normalize):
    with NormalizedSlide(path, normalize) as slide, openslide.OpenSlide(written) as expected:
        ours, theirs = (DeepZoomGenerator(each, tile_size=254, overlap=1) for each in (slide, expected))
        assert ours.level_dimensions == theirs.level_dimensions
        level = ours.level_count - 1
        for column, row in ((0, 0), (2, 2), (5, 4)):
            tiles = [np.asarray(each.get_tile(level, (column, row))).astype(int) for each in (ours, theirs)]
            assert np.abs(tiles[0] - tiles[1]).max() <= 1
        thumbnails = [np.asarray(each.get_thumbnail((200, 200))).astype(int) for each in (slide, expected)]
        assert thumbnails[0].shape == thumbnails[1].shape
        assert np.abs(thumbnails[0] - thumbnails[1]).mean() < 3


def test_properties_are_those_of_the_slide_and_of_its_map(path, normalize):
    with NormalizedSlide(path, normalize) as slide, openslide.OpenSlide(path) as plain:
        assert {name: slide.properties[name] for name in plain.properties} == dict(plain.properties)
        assert slide.properties["stainnorm.target"] == normalize.target
        rows = [[float(v) for v in slide.properties[f"stainnorm.map-{axis}"].split()] for axis in "ab"]
        torch.testing.assert_close(torch.tensor(rows), slide.normalize.fixed_map)
        with Slide(path) as same:
            found = slide_normalizer(same, normalize)
        offset = [float(slide.properties[f"stainnorm.offset-{axis}"]) for axis in "ab"]
        assert offset == pytest.approx(found.offset.tolist(), rel=1e-6)
        assert int(slide.properties["stainnorm.tiles"]) == found.tiles
        with pytest.raises(TypeError):
            slide.properties["a"] = "b"


def test_the_thumbnail_is_normalized_and_the_label_left_out(path, normalize):
    with NormalizedSlide(path, normalize.with_map(MAP)) as slide, openslide.OpenSlide(path) as plain:
        assert set(plain.associated_images) == {"thumbnail", "label", "macro"}
        assert set(slide.associated_images) == {"thumbnail"}
        expected = shift_ab(pil_to_tensor(plain.associated_images["thumbnail"].convert("RGB")), -MAP)
        image = slide.associated_images["thumbnail"]
        assert image.mode == "RGBA"
        assert torch.equal(pil_to_tensor(image.convert("RGB")), expected)


def test_the_color_profile_is_that_of_the_slide(tmp_path, path, normalize):
    with NormalizedSlide(path, normalize) as slide:
        assert slide.color_profile is None
    profiled = make_slide(tmp_path / "a.svs", tissue(300, 300), iccprofile=swapped_profile())
    with NormalizedSlide(profiled, normalize) as slide, openslide.OpenSlide(profiled) as plain:
        assert slide.color_profile.profile.profile_id == plain.color_profile.profile.profile_id
        assert slide.get_thumbnail((50, 50)).info["icc_profile"] == plain.get_thumbnail((50, 50)).info["icc_profile"]


def in_worker(slide):
    return np.asarray(slide.read_region((300, 200), 0, (150, 130)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_open_it_again(path, normalize, method, two_threads):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    with NormalizedSlide(path, normalize) as slide:
        expected = in_worker(slide)
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert np.array_equal(pool.apply_async(in_worker, (slide,)).get(60), expected)
        copied = pickle.loads(pickle.dumps(slide))
        assert (copied.tiles, dict(copied.properties)) == (slide.tiles, dict(slide.properties))
        copied.close()
        assert np.array_equal(in_worker(slide), expected)


def test_threads_share_it(path, normalize):
    with NormalizedSlide(path, normalize) as slide, ThreadPoolExecutor(4) as pool:
        expected = [*regions(slide)]
        for found in pool.map(lambda _: [*regions(slide)], range(8)):
            assert all(map(np.array_equal, found, expected))


def test_what_cannot_be_read_says_why(tmp_path, path, normalize):
    with NormalizedSlide(path, normalize) as slide:
        with pytest.raises(ValueError, match="level from 0 to 1, got 2"):
            slide.read_region((0, 0), 2, (10, 10))
        with pytest.raises(ValueError, match="1 x 1 pixels or more"):
            slide.read_region((0, 0), 0, (-1, 10))
        # Like OpenSlide.
        assert slide.read_region((0, 0), 0, (0, 10)).size == (0, 10)
    with pytest.raises(ValueError, match=r"a\.svs is closed"):
        slide.read_region((0, 0), 0, (10, 10))
    with pytest.raises(ValueError, match="closed"):
        pickle.loads(pickle.dumps(slide)).read_region((0, 0), 0, (10, 10))
    slide.close()
    with pytest.raises(FileNotFoundError):
        NormalizedSlide(tmp_path / "none.svs", normalize)
    broken = damage(make_slide(tmp_path / "b.svs", tissue(700, 700)))
    with NormalizedSlide(broken, normalize.with_map(MAP)) as slide, pytest.raises(ValueError, match="damaged at"):
        slide.read_region((0, 0), 0, slide.dimensions)


def test_a_slide_that_has_changed_is_not_opened_again(tmp_path, path, normalize):
    copied = shutil.copy(path, tmp_path / "a.svs")
    with NormalizedSlide(copied, normalize) as slide:
        content = pickle.dumps(slide)
        expected = in_worker(slide)
        os.utime(copied, (1, 1))
        # What is open reads on.
        assert np.array_equal(in_worker(slide), expected)
        with pytest.raises(ValueError, match="has changed since it was opened"):
            pickle.loads(content)


def test_without_tissue_nothing_changes(tmp_path, normalize):
    path = make_slide(tmp_path / "a.svs", np.full((300, 400, 3), 240, np.uint8))
    with NormalizedSlide(path, normalize) as slide, openslide.OpenSlide(path) as plain:
        assert slide.tiles == 0
        assert all(map(np.array_equal, regions(slide), regions(plain)))


def test_it_is_refused_where_it_is_no_transform(path):
    with pytest.raises(AttributeError):
        NormalizedSlide(path, None)
    assert NormalizedSlide.detect_format(path) == "aperio"
    assert isinstance(NormalizedSlide(path, NormalizeStain.pretrained()), openslide.AbstractSlide)
