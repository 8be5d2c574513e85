import io
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from synthetic import damage, make_slide, on_glass, swapped_profile, tissue, write_ome

from stainnorm_transform.slides import Slide, SlideTiles, slide_normalizer


def test_a_slide_says_what_it_is(slide_path):
    with Slide(slide_path) as slide:
        assert slide.dimensions == (1500, 1100)
        assert slide.level_dimensions == [(1500, 1100), (375, 275)]
        assert slide.level_downsamples == pytest.approx([1, 4])
        assert slide.mpp == (0.5, 0.5)
        assert slide.objective == 20
        assert slide.icc_profile is None
        assert {name: image.size for name, image in slide.associated_images().items()}.keys() == {
            "label",
            "macro",
            "thumbnail",
        }


def test_regions_are_the_pixels_of_the_slide(slide_path, pixels):
    with Slide(slide_path) as slide:
        assert torch.equal(slide.read(0, 0, 1500, 1100), torch.from_numpy(pixels).permute(2, 0, 1))
        # Across borders of its tiles.
        assert np.array_equal(slide.read(470, 230, 300, 270).permute(1, 2, 0).numpy(), pixels[230:500, 470:770])
        assert slide.read(0, 0, 375, 275, level=1).shape == (3, 275, 375)


@pytest.mark.parametrize(
    ("compression", "options", "tolerance"),
    [
        (None, {"tile": (256, 256)}, 0),
        ("zlib", {}, 0),
        ("lzw", {"predictor": True}, 0),
        ("jpeg", {"subsampling": (1, 1)}, 1),
        ("jpeg", {"subsampling": (2, 2)}, 1),
        ("aperio_jp2000_rgb", {}, 0),
    ],
)
def test_aperios_tiles_are_decoded_directly_as_openslide_would(tmp_path, pixels, compression, options, tolerance):
    path = make_slide(tmp_path / "a.svs", pixels[:1097, :1499], levels=(2, 8), compression=compression, **options)

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def check(data):
        level = data.draw(st.sampled_from([0, 1, 2]))
        x, y = (data.draw(st.integers(-300, 1600)) for _ in range(2))
        size = data.draw(st.integers(1, 600)), data.draw(st.integers(1, 600))
        expected = np.asarray(reference.read_region((x, y), level, size)).astype(int)
        out = slide.pixels(x, y, *size, level)
        seen = expected[..., 3] == 255
        assert (np.abs(out - expected)[seen][..., :3] <= tolerance).all()
        assert (out[expected[..., 3] == 0] == 255).all()

    with Slide(path) as slide, openslide.OpenSlide(path) as reference:
        assert len(slide._reader._levels) == 3
        check()


def test_a_missing_tile_is_left_to_openslide(tmp_path, pixels):
    """Which shows a smaller level there, or nothing."""
    path = make_slide(tmp_path / "a.svs", pixels, levels=(4,))
    with tifffile.TiffFile(path, mode="r+") as file:
        counts = file.pages[0].tags["TileByteCounts"]
        counts.overwrite([0, *counts.value[1:]])
    with Slide(path) as slide, openslide.OpenSlide(path) as reference:
        assert not slide._reader._levels
        expected = np.asarray(reference.read_region((0, 0), 0, (500, 500)).convert("RGBA"))
        out = slide.pixels(0, 0, 500, 500)
    seen = expected[..., 3] == 255
    assert np.array_equal(out[seen], expected[seen])


def test_outside_of_the_slide_is_white(slide_path, pixels):
    with Slide(slide_path) as slide:
        region = slide.read(1400, 1000, 300, 300).permute(1, 2, 0).numpy()
    assert np.array_equal(region[:100, :100], pixels[1000:, 1400:])
    assert (region[100:] == 255).all()
    assert (region[:, 100:] == 255).all()


def test_a_missing_level_is_named(slide_path):
    with Slide(slide_path) as slide, pytest.raises(ValueError, match="expected a level from 0 to 1, got 2"):
        slide.read(0, 0, 10, 10, level=2)


def test_a_thumbnail_shows_the_whole_slide(slide_path, pixels):
    with Slide(slide_path) as slide:
        thumbnail = slide.thumbnail(100)
    assert thumbnail.size in ((100, 73), (100, 74))
    expected = Image.fromarray(pixels).resize(thumbnail.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(thumbnail).astype(int) - np.asarray(expected)).mean() < 8


def test_ome_tiff_is_read_with_its_levels_and_metadata(tmp_path, pixels):
    path = tmp_path / "a.ome.tif"
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "zlib"}
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as file:
        metadata = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.26}
        file.write(pixels, subifds=1, metadata=metadata, **options)
        file.write(np.ascontiguousarray(pixels[::2, ::2]), subfiletype=1, metadata=None, **options)
    with Slide(path) as slide:
        assert slide.level_dimensions == [(1500, 1100), (750, 550)]
        assert slide.mpp == (0.25, 0.26)
        assert slide.objective is None
        assert np.array_equal(slide.read(200, 300, 700, 500).permute(1, 2, 0).numpy(), pixels[300:800, 200:900])


@pytest.mark.parametrize("kind", ["svs", "ome.tif"])
def test_damaged_tiles_are_found_and_named(tmp_path, pixels, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "svs":
        make_slide(path, pixels)
    else:
        with tifffile.TiffWriter(path, ome=True) as file:
            file.write(pixels, tile=(256, 256), photometric="rgb", compression="zlib", metadata={"axes": "YXS"})
    damage(path)
    with Slide(path) as slide, pytest.raises(ValueError, match=r"damaged at x = 600, y = 0 of 400 x 300 pixels: \w"):
        slide.read(600, 0, 400, 300)


@pytest.mark.parametrize("lost", ["half", "block"])
@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
@pytest.mark.parametrize("suffix", ["svs", "tif"])
def test_lost_jpeg_data_is_damage(tmp_path, pixels, suffix, photometric, lost):
    """libjpeg only warns of it, and makes up the rest of the tile. In Aperio's slides OpenSlide decides."""
    path = tmp_path / f"a.{suffix}"
    text = "Aperio Image Library v0\n1500x1100" if suffix == "svs" else None
    options = {"photometric": photometric, "compression": "jpeg", "metadata": None, "description": text}
    tifffile.imwrite(path, pixels, tile=(240, 240), **options)
    with tifffile.TiffFile(path) as tiff:
        where, length = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    with path.open("r+b") as file:
        file.seek(where + length // 2)
        file.write(bytes(length // 2 - 2 if lost == "half" else 512))
    if suffix == "svs":
        with openslide.OpenSlide(path) as reference:
            try:
                expected = np.asarray(reference.read_region((0, 0), 0, (100, 200)))
            except openslide.OpenSlideError:
                expected = None
        if expected is not None:
            with Slide(path) as slide:
                assert np.array_equal(slide.pixels(0, 0, 100, 200), expected)
            return
    with Slide(path) as slide:
        assert slide.read(500, 300, 400, 300).shape == (3, 300, 400)
        with pytest.raises(ValueError, match="damaged at x = 0, y = 0 of 100 x 200 pixels"):
            slide.read(0, 0, 100, 200)
    with Slide(path, skip_damaged=True) as slide:
        assert (slide.read(0, 0, 100, 200) == 255).all()
        assert slide.damaged == [(0, 0, 240, 240)]


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9, 0.99])
def test_a_truncated_slide_is_found(tmp_path, pixels, kept, caplog):
    path = make_slide(tmp_path / "a.svs", pixels)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"damaged"), Slide(path) as slide:
        slide.read(0, 0, 1500, 1100)
    assert not caplog.records


def test_colors_are_converted_by_the_profile_if_asked(tmp_path, pixels):
    path = make_slide(tmp_path / "a.svs", pixels, iccprofile=swapped_profile())
    with Slide(path) as slide:
        assert slide.icc_profile == swapped_profile()
        assert np.array_equal(slide.read(0, 0, 400, 400).permute(1, 2, 0).numpy(), pixels[:400, :400])
    with Slide(path, to_srgb=True) as slide:
        found = slide.read(0, 0, 400, 400).permute(1, 2, 0).numpy()
        assert "sRGB" in ImageCms.getProfileName(ImageCms.ImageCmsProfile(io.BytesIO(slide.icc_profile)))
    assert np.abs(found.astype(int) - pixels[:400, :400, ::-1]).max() <= 2


def test_outside_of_an_ome_tiff_is_white_too(tmp_path, pixels):
    with Slide(write_ome(tmp_path / "a.ome.tif", pixels)) as slide:
        region = slide.read(1400, 1000, 300, 300).permute(1, 2, 0).numpy()
        before = slide.read(-50, -20, 100, 100).permute(1, 2, 0).numpy()
        assert (slide.read(1600, 5000, 10, 10) == 255).all()
    assert np.array_equal(region[:100, :100], pixels[1000:, 1400:])
    assert (region[100:] == 255).all()
    assert (region[:, 100:] == 255).all()
    assert np.array_equal(before[20:, 50:], pixels[:80, :50])
    assert (before[:20] == 255).all()


@pytest.mark.parametrize(("height", "width"), [(1025, 769), (1537, 2049), (513, 700)])
def test_levels_of_odd_sizes_are_read_to_the_pixel(tmp_path, height, width):
    pixels = tissue(height, width)
    levels = [pixels, np.asarray(Image.fromarray(pixels).reduce(2)), np.asarray(Image.fromarray(pixels).reduce(4))]
    path, options = tmp_path / "a.ome.tif", {"tile": (128, 128), "photometric": "rgb"}
    with tifffile.TiffWriter(path, ome=True) as file:
        for number, level in enumerate(levels):
            file.write(
                level, subifds=0 if number else 2, subfiletype=min(number, 1), metadata={"axes": "YXS"}, **options
            )
    with Slide(path) as slide:
        for number, (level, scale) in enumerate(zip(levels, slide.level_downsamples, strict=True)):
            for left in range(0, level.shape[1] - 20, 53):
                for top in range(0, level.shape[0] - 20, 53):
                    found = slide.read(round(left * scale), round(top * scale), 20, 20, number).permute(1, 2, 0)
                    assert np.array_equal(found.numpy(), level[top : top + 20, left : left + 20])


def test_a_damaged_label_is_told(tmp_path, pixels):
    path = make_slide(tmp_path / "a.svs", pixels)
    with tifffile.TiffFile(path) as tiff:
        macro = tiff.pages[-1]
        where = macro.tags["StripOffsets"].valueoffset if "StripOffsets" in macro.tags else None
    with path.open("r+b") as file:
        file.seek(where)
        file.write((1 << 50).to_bytes(8, "little"))
    with Slide(path) as slide, pytest.raises(ValueError, match="damaged label, macro or thumbnail image"):
        slide.associated_images()


def test_nothing_stays_open(slide_path, tmp_path):
    def handles():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = handles()
    bad = make_slide(tmp_path / "a.svs", tissue(300, 300), iccprofile=b"no profile" * 20)
    for _ in range(3):
        with pytest.raises(ValueError, match="its ICC profile cannot be used"):
            Slide(bad, to_srgb=True)
        with pytest.raises(ValueError, match="expected a level"):
            SlideTiles(slide_path, None, level=9)
        SlideTiles(slide_path, None)
        with Slide(slide_path) as slide:
            slide.read(0, 0, 9, 9)
        assert handles() <= before
    with pytest.raises(ValueError, match="damaged"):
        slide.read(0, 0, 9, 9)


def test_a_slide_made_smaller_piece_by_piece(tmp_path):
    pixels = on_glass(tissue(400, 900), 700, 5000)
    with Slide(make_slide(tmp_path / "a.svs", pixels, levels=(2,))) as slide:
        for threads in (1, 3):
            small, scale = slide.reduced(4.0, threads)
            assert scale == 4
            assert small.shape == (175, 1250, 4)
            expected = Image.fromarray(pixels).reduce(4)
            assert np.abs(small[..., :3].astype(int) - np.asarray(expected)).max() <= 3


def test_a_real_slide(data, normalize):
    path = data / "slides/small_HE.svs"
    with Slide(path) as slide, openslide.OpenSlide(path) as truth:
        assert slide.dimensions == truth.dimensions == (2220, 2967)
        assert slide.mpp == (0.499, 0.499)
        assert slide.objective == 20
        region = np.asarray(truth.read_region((500, 600), 0, (700, 800)))[..., :3]
        assert np.array_equal(slide.read(500, 600, 700, 800).permute(1, 2, 0).numpy(), region)
        _, offset, tiles, *_ = slide_normalizer(slide, normalize)
        assert 40 <= tiles <= 80
        assert offset.norm() < 10
