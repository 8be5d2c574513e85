"""Which files are slides, and what is refused."""

import os
import sys
from unittest.mock import Mock

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image
from synthetic import make_slide, tissue, write_ome

from stainnorm_transform.slides import Slide, formats, is_slide
from stainnorm_transform.slides.formats import without_parts


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"abc"), "not a slide of a format that OpenSlide reads"),
        (lambda path: Image.new("RGB", (50, 50)).save(path, "PNG"), "not a slide of a format"),
        (
            lambda path: tifffile.imwrite(path, np.zeros((256, 256), np.uint8), tile=(64, 64)),
            "8-bit RGB, got 8 bits and 1 channel",
        ),
        (
            lambda path: tifffile.imwrite(path, np.zeros((256, 256, 3), np.uint16), tile=(64, 64), photometric="rgb"),
            "8-bit RGB, got 16 bits and 3 channels",
        ),
        (
            lambda path: tifffile.imwrite(path, np.zeros((256, 256, 3), np.int8), tile=(64, 64), photometric="rgb"),
            r"8-bit RGB, got 8 bits \(int8\) and 3 channels",
        ),
        (
            lambda path: tifffile.imwrite(
                path,
                np.zeros((256, 256), np.uint8),
                tile=(64, 64),
                photometric="palette",
                colormap=np.zeros((3, 256), np.uint16),
            ),
            "8-bit RGB, got a palette: convert it to RGB",
        ),
        (lambda path: path.mkdir(), "expected a regular file"),
        (lambda path: path.write_bytes(b""), "an empty file"),
    ],
)
def test_what_is_no_slide_is_named(tmp_path, make, message):
    path = tmp_path / "a.svs"
    make(path)
    with pytest.raises(ValueError, match=message):
        Slide(path)


@pytest.mark.parametrize("tag", ["TileWidth", "TileLength"])
def test_absurd_tiles_are_refused_before_memory_is_asked_for(tmp_path, tag):
    """OpenSlide would end the process."""
    path = make_slide(tmp_path / "a.svs", tissue(300, 300))
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags[tag].overwrite((1 << 19) + 128)
    with pytest.raises(ValueError, match=r"not supported: tiles of \d+ x \d+ pixels, more than 67108864"):
        Slide(path)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Slide(tmp_path / "a.svs")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: write_ome(path, tissue(200, 200), tissue(600, 600)),
            "one scan, and first, got other images beside it, which would be lost: split it first",
        ),
        (
            lambda path: write_ome(path, tissue(600, 600), tissue(500, 500)),
            "one scan, and first, got other images beside it, which would be lost: split it first",
        ),
        (
            lambda path: tifffile.imwrite(
                path, np.zeros((300, 300, 4), np.uint8), tile=(64, 64), photometric="separated"
            ),
            "expected RGB, got color model SEPARATED",
        ),
        (
            lambda path: tifffile.imwrite(
                path, np.stack([tissue(300, 300)] * 3), tile=(128, 128), photometric="rgb", ome=False
            ),
            r"expected one image, got 3 of one size \(axes \w+\), of which only one would be kept",
        ),
        (
            lambda path: write_ome(path, np.stack([tissue(300, 300)] * 3), metadata={"axes": "ZYXS"}),
            r"3 of one size \(axes ZYXS\)",
        ),
    ],
)
def test_what_would_be_lost_is_refused(tmp_path, make, message):
    make(tmp_path / "a.ome.tif")
    with pytest.raises(ValueError, match=message):
        Slide(tmp_path / "a.ome.tif")


def test_a_slide_without_the_packages_says_what_to_install(slide_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ImportError, match=r'run pip install "\.\[slides\]"'):
        Slide(slide_path)


def test_plain_images_need_no_packages_and_tiled_ones_ask_for_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    for name, tile in (("plain", None), ("tiled", (64, 64))):
        tifffile.imwrite(tmp_path / f"{name}.tif", tissue(100, 100), tile=tile, photometric="rgb")
    assert not is_slide(tmp_path / "plain.tif")
    assert is_slide(tmp_path / "tiled.tif")
    with pytest.raises(ImportError, match=r'run pip install "\.\[slides\]"'):
        Slide(tmp_path / "tiled.tif")


def test_tiffs_are_slides_if_tiled_or_with_levels_or_large(tmp_path, slide_path):
    pixels = tissue(256, 256)
    options = {"photometric": "rgb", "metadata": None}
    tifffile.imwrite(tmp_path / "plain.tif", pixels, **options)
    tifffile.imwrite(tmp_path / "tiled.tif", pixels, tile=(64, 64), **options)
    tifffile.imwrite(tmp_path / "pages.tif", np.stack([pixels] * 2), **options)
    tifffile.imwrite(tmp_path / "large.tif", shape=(8192, 8192, 3), dtype=np.uint8, rowsperstrip=256, **options)
    for name, subifds in (("levels.tif", None), ("subifds.tif", 1)):
        with tifffile.TiffWriter(tmp_path / name) as file:
            file.write(pixels, subifds=subifds, **options)
            file.write(np.ascontiguousarray(pixels[::2, ::2]), subfiletype=1, **options)
    (tmp_path / "damaged.tif").write_bytes(b"II*\0\xff\xff\xff\xff")
    slide_path.with_suffix(".tiff").write_bytes(slide_path.read_bytes())
    found = {path.name: is_slide(path) for path in tmp_path.iterdir()}
    assert found == {
        "plain.tif": False,
        "tiled.tif": True,
        "pages.tif": False,
        "damaged.tif": False,
        "large.tif": True,
        "levels.tif": True,
        "subifds.tif": True,
    }
    assert is_slide(slide_path.with_suffix(".tiff"))
    assert is_slide(slide_path)
    assert not is_slide(tmp_path / "gone.tif")
    assert not is_slide(tmp_path / "a.png")


def test_pipes_are_no_slides(tmp_path):
    for name in ("a.tif", "b.vms"):
        os.mkfifo(tmp_path / name)
    assert not is_slide(tmp_path / "a.tif")
    assert len(without_parts(sorted(tmp_path.iterdir()))) == 2


@pytest.mark.parametrize("name", ["a.vsi", "A.iSyntax", "b.qptiff"])
def test_slides_of_kinds_that_are_not_read_are_refused_with_advice(tmp_path, name):
    (tmp_path / name).write_bytes(b"II*\0")
    with pytest.raises(
        ValueError, match=r"^not supported: \w+.* \(\.\w+\); convert it to OME-TIFF or DICOM, by QuPath"
    ):
        Slide(tmp_path / name)


def test_what_openslide_does_not_support_is_not_called_damaged(slide_path, monkeypatch):
    monkeypatch.setattr(openslide.OpenSlide, "detect_format", lambda path: "zeiss")
    for text in ("JPEG XR compression is not supported", "Unsupported JPEG XR compression"):
        error = openslide.OpenSlideError(text)
        monkeypatch.setattr(formats, "OpenSlideReader", Mock(side_effect=error))
        with pytest.raises(ValueError, match=r"^not supported: JPEG XR compression; convert it"):
            Slide(slide_path)


def test_parts_of_a_slide_are_no_images_of_their_own(tmp_path):
    (tmp_path / "odd.vms").write_text("ImageFile=..\nMapFile=.\nx=\ny=a/b\n=\n")
    for name in ("a(1,0).jpg", "a_map.jpg", "b.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "a.vms").write_text("[Virtual Microscope Specimen]\nImageFile(1,0)=a(1,0).jpg\nMapFile=a_map.jpg\n")
    found = without_parts(sorted(tmp_path.iterdir()))
    assert [path.name for path in found] == ["a.vms", "b.jpg", "odd.vms"]


@pytest.mark.parametrize("tile", [(64, 64), None])
def test_pages_that_form_a_circle_are_damage_and_end(tmp_path, tile):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for side in (256, 128):
            file.write(tissue(side, side), tile=tile, photometric="rgb", metadata=None)
    with tifffile.TiffFile(path) as tiff:
        first, end = tiff.pages[0].offset, tiff.pages.next_page_offset
    with path.open("r+b") as file:
        file.seek(end)
        file.write(first.to_bytes(4, sys.byteorder))
    assert is_slide(path) == (tile is not None)
    with pytest.raises(ValueError, match=r"a damaged or truncated TIFF \(its pages form a circle\)"):
        Slide(path)


def test_more_pages_than_any_slide_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_MOST_PAGES", 2)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.stack([tissue(64, 64)] * 3), tile=(64, 64), photometric="rgb", metadata=None)
    with pytest.raises(ValueError, match="not supported: a TIFF of more than 2 pages"):
        Slide(path)
