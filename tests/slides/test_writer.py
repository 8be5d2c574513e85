from itertools import pairwise

import numpy as np
import openslide
import pytest
import tifffile
import tiffslide
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import by_openslide, levels_of, make_slide, tissue

from stainnorm_transform import ColorNormNet, NormalizeStain
from stainnorm_transform.color import as_map, shift_ab
from stainnorm_transform.slides import Slide, SlideFormat, slide_normalizer, write_slide, writer
from stainnorm_transform.slides.pyramid import level_sizes

LOSSLESS = SlideFormat(quality=None)
MAP = torch.tensor([[12.0, 1.5, 3.25, -0.5], [-15.0, 0.75, -1.0, 2.0]])


@pytest.fixture(scope="module")
def normalize():
    return NormalizeStain(ColorNormNet(), target="test|ed", fixed_map=MAP)


def write(path, out, normalize, file_format=LOSSLESS, threads=2):
    with Slide(path) as slide:
        write_slide(slide, out, normalize, file_format, threads)
    return out


def shifted(pixels, color_map, preserve_white=True):
    """By ``shift_ab``, as integers that can be subtracted."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    return shift_ab(image, -color_map, preserve_white).permute(1, 2, 0).numpy().astype(int)


def halved(pixels):
    """Means of two by two pixels, of an odd last row or column with itself, rounded half up."""
    padded = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge").astype(int)
    total = padded[::2, ::2] + padded[1::2, ::2] + padded[::2, 1::2] + padded[1::2, 1::2]
    return ((total + 2) // 4).astype(np.uint8)


@pytest.mark.parametrize("ome", [False, True])
@pytest.mark.parametrize(("height", "width"), [(1300, 2100), (1024, 1024), (512, 512), (513, 511), (37, 2500), (1, 1)])
def test_it_is_the_tile_transform_with_the_same_map_in_every_level(tmp_path, normalize, height, width, ome):
    """So there are no seams between tiles, blocks, or levels."""
    pixels = tissue(height, width)
    path = make_slide(tmp_path / "a.svs", pixels, levels=())
    out = write(path, tmp_path / "out.tif", normalize, SlideFormat(quality=None, ome=ome))
    levels = levels_of(out)
    assert [level.shape[1::-1] for level in levels] == level_sizes(width, height)
    assert_same_but_for_rounding(levels[0], shifted(pixels, MAP))
    for larger, smaller in pairwise(levels):
        assert np.array_equal(smaller, halved(larger))
    if not ome:
        for number, level in enumerate(levels):
            assert np.array_equal(by_openslide(out, number), level)


def assert_same_but_for_rounding(level, expected):
    """Rare pixels are rounded to the next level."""
    difference = np.abs(level.astype(int) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 1e-4


@pytest.mark.parametrize("color_map", [MAP, as_map(MAP[:, 0])], ids=["map", "offset"])
@pytest.mark.parametrize("preserve_white", [True, False])
def test_a_table_gives_the_same(tmp_path, monkeypatch, color_map, preserve_white):
    """Large slides go through one, small ones do not."""
    pixels = tissue(600, 700)
    path = make_slide(tmp_path / "a.svs", pixels)
    fixed = NormalizeStain(ColorNormNet(), preserve_white, fixed_map=color_map)
    expected = shifted(pixels, color_map, preserve_white)
    for name, size in (("without.tif", pixels.size), ("with.tif", 1)):
        monkeypatch.setattr(writer, "TABLE_SIZE", size)
        with monkeypatch.context() as patched:
            # Nothing else may be used.
            patched.setattr(writer, "shift_pixels" if size == 1 else "shift_table", None)
            assert_same_but_for_rounding(levels_of(write(path, tmp_path / name, fixed))[0], expected)
    assert np.abs(expected - pixels).mean() > 3


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_levels_are_halves_down_to_a_tile(width, height):
    sizes = level_sizes(width, height)
    assert sizes[0] == (width, height)
    assert max(sizes[-1]) <= 512
    for (w, h), (half_w, half_h) in pairwise(sizes):
        assert max(w, h) > 512
        assert (half_w, half_h) == (-(-w // 2), -(-h // 2))


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 1600), st.integers(1, 1600), st.integers(1, 5))
def test_any_size_and_number_of_threads(tmp_path_factory, width, height, threads):
    folder = tmp_path_factory.mktemp("any")
    pixels = tissue(height, width)
    path = make_slide(folder / "a.svs", pixels, levels=())
    levels = levels_of(write(path, folder / "out.tif", None, threads=threads))
    assert np.array_equal(levels[0], pixels)
    for larger, smaller in pairwise(levels):
        assert np.array_equal(smaller, halved(larger))


@pytest.mark.parametrize(("quality", "most"), [(95, 3), (90, 3), (80, 5), (30, 10)])
@pytest.mark.parametrize("ome", [False, True])
def test_jpeg_is_as_good_as_its_quality(tmp_path, quality, most, ome):
    pixels = tissue(1100, 1500)
    path = make_slide(tmp_path / "a.svs", pixels)
    out = write(path, tmp_path / "out.tif", None, SlideFormat(quality, ome))
    level = levels_of(out)[0]
    error = np.abs(level.astype(int) - pixels).mean()
    assert 0.2 < error < most
    # Nothing that depends on the place in a tile.
    assert np.abs(level.astype(float) - pixels).mean(axis=(1, 2))[508:516].max() < 2 * error
    if not ome:
        assert np.abs(by_openslide(out).astype(int) - level).max() <= 1
    with tifffile.TiffFile(out) as tiff:
        page = tiff.pages[0]
        assert tiff.is_bigtiff
        assert page.tile == (512, 512)
        assert page.compression == tifffile.COMPRESSION.JPEG
        assert page.photometric == tifffile.PHOTOMETRIC.YCBCR
        assert page.tags["YCbCrSubSampling"].value == ((2, 1) if quality >= 90 else (2, 2))


def test_openslide_finds_metadata_and_images(tmp_path, normalize):
    path = make_slide(tmp_path / "a.svs", tissue(1100, 1500), mpp=0.2528, objective=40, iccprofile=b"a profile" * 20)
    out = write(path, tmp_path / "out.tif", normalize)
    with openslide.OpenSlide(out) as slide:
        properties = slide.properties
        assert properties["openslide.vendor"] == "aperio"
        assert float(properties["openslide.mpp-x"]) == float(properties["openslide.mpp-y"]) == 0.2528
        assert properties["openslide.objective-power"] == "40"
        assert properties["aperio.Stain target"] == "test?ed"
        assert properties["aperio.Stain map a"] == "12.0000 1.5000 3.2500 -0.5000"
        assert properties["aperio.Stain map b"] == "-15.0000 0.7500 -1.0000 2.0000"
        assert not any("Offset" in name for name in properties)
        assert slide.level_dimensions == ((1500, 1100), (750, 550), (375, 275))
        assert slide.get_best_level_for_downsample(4) == 2
        assert set(slide.associated_images) == {"thumbnail"}
        thumbnail = np.asarray(slide.associated_images["thumbnail"].convert("RGB"))
    assert np.array_equal(thumbnail, levels_of(out)[-1])
    with tifffile.TiffFile(out) as tiff:
        assert tiff.is_svs
        for level, page in enumerate(page for page in tiff.pages if page.is_tiled):
            assert page.iccprofile == b"a profile" * 20
            assert page.resolutionunit == tifffile.RESUNIT.CENTIMETER
            assert page.get_resolution("MICROMETER") == pytest.approx([1 / 0.2528 / 2**level] * 2, rel=1e-5)


def test_readers_of_ome_tiff_find_metadata_and_images(tmp_path, normalize):
    path = make_slide(tmp_path / "a.svs", tissue(1100, 1500), mpp=0.2528, objective=40)
    out = write(path, tmp_path / "out.ome.tif", normalize, SlideFormat(None, ome=True, keep_label=True))
    with tifffile.TiffFile(out) as tiff:
        assert tiff.is_ome
        assert [series.name for series in tiff.series] == ["slide", "thumbnail", "label", "macro"]
        image = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"][0]
        assert image["Pixels"]["PhysicalSizeX"] == image["Pixels"]["PhysicalSizeY"] == 0.2528
        assert image["Pixels"]["PhysicalSizeXUnit"] == "µm"
        assert "Stain map a = 12.0000 1.5000 3.2500 -0.5000, Stain map b = -15.0000 0.7500" in image["Description"]
        assert image["ObjectiveSettings"]["ID"] == "Objective:0"
    with tiffslide.TiffSlide(out) as slide:
        assert slide.level_dimensions == ((1500, 1100), (750, 550), (375, 275))
        assert slide.properties["tiffslide.mpp-x"] == pytest.approx(0.2528, rel=1e-5)
        assert set(slide.associated_images) == {"thumbnail", "label", "macro"}
    with Slide(out) as slide:
        assert slide.mpp == (0.2528, 0.2528)
        assert slide.objective == 40


@pytest.mark.parametrize("ome", [False, True])
def test_the_label_is_kept_if_asked_only(tmp_path, normalize, ome):
    path = make_slide(tmp_path / "a.svs", tissue(600, 600))
    for keep in (False, True):
        out = write(path, tmp_path / "out.tif", normalize, SlideFormat(None, ome, keep))
        with Slide(out) as slide:
            found = slide.associated_images()
        assert ("label" in found, "macro" in found) == (keep, keep)
        if keep:
            assert found["label"].getpixel((5, 5)) == (201, 201, 201)
            assert found["macro"].getpixel((5, 5)) == (209, 209, 209)


def test_what_the_lab_wrote_is_left_out(tmp_path, normalize):
    """Names, dates and numbers may tell who the patient is."""
    path = make_slide(tmp_path / "secret.svs", tissue(600, 600))
    with tifffile.TiffFile(path) as tiff:
        text = tiff.pages[0].description
    tifffile.tiffcomment(path, text + "|Filename = secret|User = secret|Date = 01/02/03")
    for ome in (False, True):
        out = write(path, tmp_path / "out.tif", normalize, SlideFormat(80, ome))
        assert b"secret" not in out.read_bytes()


def test_qualities_that_are_none_are_refused():
    for quality in (0, 101, -1):
        with pytest.raises(ValueError, match=f"expected a JPEG quality from 1 to 100, got {quality}"):
            SlideFormat(quality)


def test_a_real_slide_in_every_format(data, tmp_path):
    path = data / "slides/small_HE.svs"
    with Slide(path) as slide:
        fixed = slide_normalizer(slide, NormalizeStain.pretrained()).normalize
        raw = slide.read(0, 0, *slide.dimensions)
    expected = fixed(raw).permute(1, 2, 0).numpy().astype(int)
    for file_format, most in ((LOSSLESS, 0), (SlideFormat(90), 3), (SlideFormat(90, ome=True), 3)):
        out = write(path, tmp_path / "out.tif", fixed, file_format)
        assert np.abs(levels_of(out)[0] - expected).mean() <= most
        assert by_openslide(out).shape == (2967, 2220, 3)


def test_without_white_preserved_glass_is_shifted_too(tmp_path, normalize):
    plain = NormalizeStain(normalize.network, preserve_white=False, fixed_map=MAP)
    pixels = tissue(300, 300)
    out = write(make_slide(tmp_path / "a.svs", pixels), tmp_path / "out.tif", plain)
    assert np.abs(levels_of(out)[0] - shifted(pixels, MAP, preserve_white=False)).max() <= 1
