"""Images to train on, of files and of slides."""

import pickle

import numpy as np
import pytest
from render_tiles import render_tile
from synthetic import damage, make_slide, on_glass, save, tissue
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform.folders import TargetImages
from stainnorm_transform.folders.targets import SLIDE_TILES


def accept(image):
    pass


@pytest.mark.parametrize(("mpp", "side", "levels"), [(0.25, 512, (16,)), (0.5, 256, (4, 16)), (0.5, 256, ())])
def test_tiles_of_a_slide_are_its_pixels_of_128_micrometers(tmp_path, mpp, side, levels):
    pixels = on_glass(tissue(3 * side, 7 * side), 6 * side, 10 * side)
    slide = make_slide(tmp_path / "a.svs", pixels, levels=levels, mpp=mpp)
    images = TargetImages()
    numbers = images.add(slide, accept)
    assert numbers == list(range(SLIDE_TILES))
    assert images.slides(numbers) == 1
    for image, (path, (x, y, width, height)) in zip(images, images.sources, strict=True):
        assert (path, width, height) == (slide, side, side)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels[y : y + side, x : x + side])
        # Glass is left out, and tiles that are mostly glass.
        assert (image < 240).any(dim=0).float().mean() > 0.25
    assert len(set(images.sources)) == SLIDE_TILES


def test_what_is_not_kept_is_read_again(tmp_path):
    paths = [make_slide(tmp_path / f"{lab}.svs", tissue(600, 600, lab)) for lab in ("lab_a", "lab_b")]
    paths.insert(1, save(tmp_path / "b.png"))
    kept, read = TargetImages(), TargetImages(memory=0)
    for path in paths:
        assert kept.add(path, accept) == read.add(path, accept)
    assert len(kept) == len(read) == 9
    assert kept.slides(range(9)) == 2
    for index in (8, 0, 4, 5, 1):
        for other in (read, pickle.loads(pickle.dumps(kept))):
            assert np.array_equal(kept[index], other[index])


def test_tiles_that_are_refused_are_passed_over(tmp_path):
    images = TargetImages()
    slide = make_slide(tmp_path / "a.svs", tissue(1024, 1024), levels=())
    number = 0

    def every_second(image):
        nonlocal number
        number += 1
        if number % 2:
            raise ValueError("no tissue")

    assert len(images.add(slide, every_second)) == 8

    def none(image):
        raise ValueError("none of them")

    with pytest.raises(ValueError, match=r"^none of them$"):
        images.add(slide, none)
    assert len(images) == 8


def test_a_file_that_cannot_be_read_adds_nothing(tmp_path):
    images = TargetImages()
    (tmp_path / "text.svs").write_text("no slide")
    with pytest.raises(ValueError, match=r"^not a slide of a format"):
        images.add(tmp_path / "text.svs", accept)
    damage(make_slide(tmp_path / "a.svs", tissue(600, 600), compression="jpeg"))
    with pytest.raises(ValueError, match=r"^damaged at x = "):
        images.add(tmp_path / "a.svs", accept)
    with pytest.raises(ValueError, match="No such file"):
        images.add(tmp_path / "b.png", accept)
    assert len(images) == 0


def test_a_file_that_goes_later_is_named(tmp_path):
    images = TargetImages(memory=0)
    path = save(tmp_path / "a.png", to_pil_image(render_tile()))
    images.add(path, accept)
    path.unlink()
    with pytest.raises(ValueError, match=f"^{path}: No such file or directory$"):
        images[0]
