import functools
import io
import os
import pickle
import sys
import threading
import time
from pathlib import Path

import numpy as np
import openslide
import pytest
import slide_resnet
import tifffile
import torch
from conftest import make_slide, tissue
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from render_tiles import LABS
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from stainnorm_transform import NormalizeStain, slide_reader, slides
from stainnorm_transform.estimate import mean_offset, robust_mean_offset
from stainnorm_transform.slide_reader import Slide, is_slide, without_parts
from stainnorm_transform.slides import SlideTiles, slide_normalizer
from stainnorm_transform.threads import in_order


@pytest.fixture(scope="module")
def normalize():
    return NormalizeStain.pretrained()


@pytest.fixture(scope="module")
def pixels():
    return tissue(1100, 1500)


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory, pixels):
    return make_slide(tmp_path_factory.mktemp("slides") / "a.svs", pixels)


def on_glass(pixels, height, width):
    """Tissue in the middle of glass."""
    out = np.full((height, width, 3), 245, np.uint8)
    top, left = (height - pixels.shape[0]) // 2, (width - pixels.shape[1]) // 2
    out[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return out


# --- Reading


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


@pytest.mark.parametrize("properties", [{"mpp": None}, {"mpp": 0}, {"mpp": "nan"}, {"mpp": "abc"}])
def test_no_resolution_is_none(tmp_path, properties):
    with Slide(make_slide(tmp_path / "a.svs", tissue(256, 256), objective=None, **properties)) as slide:
        assert slide.mpp is None
        assert slide.objective is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"abc"), "not a slide of a format that OpenSlide reads"),
        (lambda path: Image.new("RGB", (50, 50)).save(path, "PNG"), "not a slide of a format"),
        (
            lambda path: tifffile.imwrite(path, np.zeros((256, 256), np.uint8), tile=(64, 64)),
            "8-bit RGB, got 8 bits and 1 channel a page",
        ),
        (
            lambda path: tifffile.imwrite(path, np.zeros((256, 256, 3), np.uint16), tile=(64, 64), photometric="rgb"),
            "8-bit RGB, got 16 bits and 3 channels a page",
        ),
        (lambda path: path.mkdir(), "expected a regular file"),
        (lambda path: path.write_bytes(b""), "an empty file"),
        (lambda path: tifffile.imwrite(path, tissue(300, 300), photometric="rgb"), "a TIFF that is not tiled"),
        (
            lambda path: tifffile.imwrite(
                path, tissue(64, 64).transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate", ome=True
            ),
            "side by side, got separate planes",
        ),
    ],
)
def test_what_is_no_slide_is_named(tmp_path, make, message):
    path = tmp_path / "a.svs"
    make(path)
    with pytest.raises(ValueError, match=message):
        Slide(path)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Slide(tmp_path / "a.svs")


def damage(path, level=0, tile=3):
    """Overwrites the end of a compressed tile."""
    with tifffile.TiffFile(path) as tiff:
        page = [page for page in tiff.pages if page.is_tiled][level]
        where, length = page.dataoffsets[tile], page.databytecounts[tile]
    with path.open("r+b") as file:
        file.seek(where)
        file.write(b"\xff" * length)


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


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9, 0.99])
def test_a_truncated_slide_is_found(tmp_path, pixels, kept, caplog):
    path = make_slide(tmp_path / "a.svs", pixels)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"damaged"), Slide(path) as slide:
        slide.read(0, 0, 1500, 1100)
    assert not caplog.records


@functools.cache  # it holds the second at which it was made
def swapped_profile():
    """sRGB with red and blue exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    a, b = (profile.index(name) + 4 for name in (b"rXYZ", b"bXYZ"))
    profile[a : a + 8], profile[b : b + 8] = profile[b : b + 8], profile[a : a + 8]
    return bytes(profile)


def test_colors_are_converted_by_the_profile_if_asked(tmp_path, pixels):
    path = make_slide(tmp_path / "a.svs", pixels, iccprofile=swapped_profile())
    with Slide(path) as slide:
        assert slide.icc_profile == swapped_profile()
        assert np.array_equal(slide.read(0, 0, 400, 400).permute(1, 2, 0).numpy(), pixels[:400, :400])
    with Slide(path, to_srgb=True) as slide:
        found = slide.read(0, 0, 400, 400).permute(1, 2, 0).numpy()
        assert "sRGB" in ImageCms.getProfileName(ImageCms.ImageCmsProfile(io.BytesIO(slide.icc_profile)))
    assert np.abs(found.astype(int) - pixels[:400, :400, ::-1]).max() <= 2


def write_ome(path, *images, metadata=None, **options):
    """An OME-TIFF of several series."""
    with tifffile.TiffWriter(path, ome=True) as file:
        for image in images:
            options = {"tile": (128, 128), "photometric": "rgb", **options}
            file.write(image, metadata={"axes": "YXS", **(metadata or {})}, **options)
    return path


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


@pytest.mark.parametrize(("unit", "factor"), [("nm", 1e-3), ("µm", 1), ("mm", 1e3), (None, 1)])
def test_units_of_ome_tiff(tmp_path, unit, factor):
    metadata = {}
    for axis, value in (("X", 0.25), ("Y", 0.3)):
        metadata[f"PhysicalSize{axis}"] = value / factor
        if unit:
            metadata[f"PhysicalSize{axis}Unit"] = unit
    with Slide(write_ome(tmp_path / "a.ome.tif", tissue(300, 300), metadata=metadata)) as slide:
        assert slide.mpp == pytest.approx((0.25, 0.3))


def test_the_objective_is_that_of_the_image(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", tissue(300, 300))
    text = tifffile.tiffcomment(path)
    two = "".join(f'<Objective ID="O:{i}" NominalMagnification="{m}"/>' for i, m in enumerate((4, 40)))
    for used, expected in (('<ObjectiveSettings ID="O:1"/>', 40), ('<ObjectiveSettings ID="O:0"/>', 4), ("", None)):
        changed = text.replace("<Image ", f'<Instrument ID="I:0">{two}</Instrument><Image ', 1)
        tifffile.tiffcomment(path, changed.replace("<Pixels ", f"{used}<Pixels ", 1).encode())
        with Slide(path) as slide:
            assert slide.objective == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: write_ome(path, tissue(200, 200), tissue(600, 600)),
            "one scan, and first, got 2 images",
        ),
        (
            lambda path: write_ome(path, tissue(600, 600), tissue(500, 500)),
            "one scan, and first, got 2 images",
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
            "3 pages, of which only one would be kept",
        ),
        (lambda path: write_ome(path, np.stack([tissue(300, 300)] * 3), metadata={"axes": "ZYXS"}), "got axes ZYXS"),
    ],
)
def test_what_would_be_lost_is_refused(tmp_path, make, message):
    make(tmp_path / "a.ome.tif")
    with pytest.raises(ValueError, match=message):
        Slide(tmp_path / "a.ome.tif")


def test_absurd_resolutions_are_none(tmp_path):
    for mpp in (1e-7, 1e300, -1):
        with Slide(make_slide(tmp_path / "a.svs", tissue(300, 300), mpp=mpp)) as slide:
            assert slide.mpp is None


def test_the_background_is_that_of_the_slide():
    assert slide_reader._rgba("F0E1D2") == (240, 225, 210, 255)
    assert slide_reader._rgba(None) == slide_reader._rgba("no color") == (255, 255, 255, 255)


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


def test_a_slide_without_the_packages_says_what_to_install(slide_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ImportError, match=r'pip install "stainnorm-transform\[slides\]"'):
        Slide(slide_path)


# --- Which files are slides


def test_tiffs_are_slides_if_tiled_and_of_several_pages_or_large(tmp_path, slide_path):
    pixels = tissue(256, 256)
    options = {"photometric": "rgb", "metadata": None}
    tifffile.imwrite(tmp_path / "plain.tif", pixels, **options)
    tifffile.imwrite(tmp_path / "tiled.tif", pixels, tile=(64, 64), **options)
    tifffile.imwrite(tmp_path / "pages.tif", np.stack([pixels] * 2), **options)
    tifffile.imwrite(tmp_path / "large.tif", shape=(8192, 8192, 3), dtype=np.uint8, tile=(256, 256), **options)
    with tifffile.TiffWriter(tmp_path / "levels.tif") as file:
        file.write(pixels, tile=(64, 64), subifds=1, **options)
        file.write(pixels[:128, :128], tile=(64, 64), subfiletype=1, **options)
    (tmp_path / "damaged.tif").write_bytes(b"II*\0\xff\xff\xff\xff")
    slide_path.with_suffix(".tiff").write_bytes(slide_path.read_bytes())
    found = {path.name: is_slide(path) for path in tmp_path.iterdir()}
    assert found == {
        "plain.tif": False,
        "tiled.tif": False,
        "pages.tif": False,
        "damaged.tif": False,
        "large.tif": True,
        "levels.tif": True,
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


def test_files_of_one_dicom_slide_are_one(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, path):
            if path.stem == "none":
                raise ValueError("no slide")
            self.series = path.stem[0]

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    monkeypatch.setattr(slide_reader, "Slide", Fake)
    paths = [tmp_path / name for name in ("x/a1.dcm", "x/a2.dcm", "x/b1.dcm", "x/none.dcm", "y/a1.dcm")]
    assert without_parts(paths) == [paths[0], *paths[2:]]


def test_parts_of_a_slide_are_no_images_of_their_own(tmp_path):
    (tmp_path / "odd.vms").write_text("ImageFile=..\nMapFile=.\nx=\ny=a/b\n=\n")
    for name in ("a(1,0).jpg", "a_map.jpg", "b.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "a.vms").write_text("[Virtual Microscope Specimen]\nImageFile(1,0)=a(1,0).jpg\nMapFile=a_map.jpg\n")
    found = without_parts(sorted(tmp_path.iterdir()))
    assert [path.name for path in found] == ["a.vms", "b.jpg", "odd.vms"]


# --- The offset


def test_the_offset_is_that_of_its_tissue_tiles(tmp_path, normalize):
    """Of the tissue in the middle, by tiles of 256 pixels, which at 20x are 128 micrometers."""
    pixels = on_glass(tissue(1024, 1024), 2048, 2048)
    with Slide(make_slide(tmp_path / "a.svs", pixels, levels=(4, 16))) as slide:
        fixed, tiles = slide_normalizer(slide, normalize)
        cut = [slide.read(x, y, 256, 256) for y in range(512, 1536, 256) for x in range(512, 1536, 256)]
    assert tiles == 16
    assert torch.allclose(fixed.offset, normalize.for_slide(cut).offset, atol=1e-4)


def test_the_offset_is_always_the_same(slide_path, normalize):
    with Slide(slide_path) as slide:
        offsets = [slide_normalizer(slide, normalize, threads)[0].offset for threads in (1, 2, 5)]
    assert torch.equal(offsets[0], offsets[1])
    assert torch.equal(offsets[0], offsets[2])


def test_without_small_levels_tiles_are_looked_through(tmp_path, normalize):
    pixels = on_glass(tissue(1024, 1024), 2048, 2048)
    offsets = []
    for levels in ((), (4, 16)):
        with Slide(make_slide(tmp_path / "a.svs", pixels, levels=levels)) as slide:
            fixed, tiles = slide_normalizer(slide, normalize)
        assert tiles == 16
        offsets.append(fixed.offset)
    assert torch.allclose(*offsets, atol=1e-4)


def test_no_more_tiles_are_read_than_needed(tmp_path, normalize, monkeypatch):
    monkeypatch.setattr(slides, "SAMPLED_TILES", 5)
    with Slide(make_slide(tmp_path / "a.svs", tissue(1024, 1024))) as slide:
        assert slide_normalizer(slide, normalize)[1] == 5


def test_places_begin_with_much_tissue_and_are_spread_evenly(tmp_path):
    pixels = on_glass(tissue(2048, 4096), 4096, 6144)
    pixels[-256:, -256:-100] = tissue(256, 156)  # over half of a tile, and
    pixels[:256, :100] = tissue(256, 100)  # less than half
    with Slide(make_slide(tmp_path / "a.svs", pixels, levels=(16,))) as slide:
        places = list(slides.places(slide, 256, 1))
    assert len(places) == len(set(places)) == 8 * 16 + 2
    assert places[-1] == (0, 0)
    for count in (16, 32, 64, 128):
        x, y = np.array(places[:count]).mean(axis=0)
        assert abs(x - 2944) < 600
        assert abs(y - 1920) < 300
        assert len({row for _, row in places[:count]}) >= min(8, count / 2)


@pytest.mark.parametrize(
    ("mpp", "objective", "side"),
    [
        (0.25, 40, 512),
        (0.5, 20, 256),
        (0.5, 40, 256),
        (None, 20, 256),
        (None, None, 512),
        (0.1, 40, 1024),
        (8.0, 5, 128),
    ],
)
def test_tiles_of_the_estimate_are_as_large_on_the_glass(tmp_path, mpp, objective, side):
    with Slide(make_slide(tmp_path / "a.svs", tissue(300, 300), mpp=mpp, objective=objective)) as slide:
        assert slides.sampled_side(slide) == side


def test_blank_slides_have_no_offset(tmp_path, normalize):
    for levels in ((), (4,)):
        path = make_slide(tmp_path / "a.svs", np.full((600, 700, 3), 243, np.uint8), levels=levels)
        with Slide(path) as slide:
            fixed, tiles = slide_normalizer(slide, normalize)
        assert tiles == 0
        assert fixed.offset.tolist() == [0, 0, 0]


def test_a_fixed_offset_is_taken(slide_path, normalize):
    given_one = NormalizeStain(normalize.network, offset=torch.tensor([0.0, 3.0, -4.0]))
    with Slide(slide_path) as slide:
        assert slide_normalizer(slide, given_one) == (given_one, None)


def test_slides_smaller_than_a_tile_have_an_offset(tmp_path, normalize):
    with Slide(make_slide(tmp_path / "a.svs", tissue(100, 90), levels=())) as slide:
        fixed, tiles = slide_normalizer(slide, normalize)
    assert tiles == 1
    assert torch.allclose(
        fixed.offset, normalize.for_slide([torch.from_numpy(tissue(100, 90)).permute(2, 0, 1)]).offset
    )


def test_pen_on_part_of_the_tissue_hardly_moves_the_offset(tmp_path, normalize):
    clean = tissue(2048, 2048)
    marked = clean.copy()
    marked[:400] = (clean[:400] * np.array([0.25, 0.6, 0.4])).astype(np.uint8)  # green ink, a fifth of the slide
    offsets = []
    for pixels in (clean, marked):
        with Slide(make_slide(tmp_path / "a.svs", pixels, levels=(4, 16))) as slide:
            offsets.append(slide_normalizer(slide, normalize)[0].offset)
    tiles = torch.from_numpy(marked).permute(2, 0, 1).unfold(1, 256, 256).unfold(2, 256, 256).permute(1, 2, 0, 3, 4)
    naive = normalize.for_slide(tiles.reshape(-1, 3, 256, 256)).offset
    moved = (offsets[1] - offsets[0]).norm()
    assert moved < 1
    assert (naive - offsets[0]).norm() > 3 * moved


@given(
    st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=3, max_size=30),
    st.floats(-20, 20),
    st.randoms(),
)
def test_the_mean_without_far_tiles(offsets, shift, random):
    sums = torch.tensor([[a, b, 1.0] for a, b in offsets])
    result = robust_mean_offset(sums)
    assert result[0] == 0
    low, high = sums[:, :2].min(dim=0).values, sums[:, :2].max(dim=0).values
    assert ((result[1:] >= low - 1e-3) & (result[1:] <= high + 1e-3)).all()
    close = torch.tensor([[0.3 * a / 30, 0.3 * b / 30, 1.0] for a, b in offsets])
    # Tiles that agree all count; a few that are far do not, wherever they are.
    assert torch.allclose(robust_mean_offset(close), mean_offset(close.sum(dim=0)), atol=1e-4)
    few = (len(offsets) - 1) // 2
    far = torch.cat([close, close[:few] + torch.tensor([40.0 + abs(shift), -40.0, 0.0])])
    assert torch.allclose(robust_mean_offset(far), robust_mean_offset(close), atol=1e-4)
    shuffled = list(range(len(sums)))
    random.shuffle(shuffled)
    assert torch.allclose(robust_mean_offset(sums[shuffled]), result, atol=1e-3)


def test_no_tiles_have_no_offset():
    assert robust_mean_offset(torch.zeros(0, 3)).tolist() == [0, 0, 0]
    assert robust_mean_offset(torch.zeros(4, 3)).tolist() == [0, 0, 0]


# --- Tiles of a slide


def test_tiles_are_those_of_the_slide_in_its_normalized_colors(tmp_path, normalize):
    pixels = on_glass(tissue(512, 768), 1024, 1280)
    path = make_slide(tmp_path / "a.svs", pixels)
    tiles = SlideTiles(path, normalize, side=256)
    assert tiles.corners == [(x, y) for y in (256, 512) for x in (256, 512, 768)]
    with Slide(path) as slide:
        fixed, _ = slide_normalizer(slide, normalize)
    assert torch.equal(tiles.normalize.offset, fixed.offset)
    for index, (x, y) in enumerate(tiles.corners):
        item = tiles[index]
        assert (item["x"], item["y"], item["level"]) == (x, y, 0)
        assert torch.equal(item["image"], fixed(torch.from_numpy(pixels[y : y + 256, x : x + 256]).permute(2, 0, 1)))
    raw = SlideTiles(path, None, side=256)[0]["image"]
    assert np.array_equal(raw.permute(1, 2, 0).numpy(), pixels[256:512, 256:512])


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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_tiles_go_through_a_data_loader(slide_path, normalize, workers, context):
    tiles = SlideTiles(slide_path, normalize, side=200)
    loader = DataLoader(tiles, batch_size=8, num_workers=workers, multiprocessing_context=context if workers else None)
    batches = list(loader)
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), torch.stack([t["image"] for t in tiles]))
    assert torch.cat([batch["x"] for batch in batches]).tolist() == [x for x, _ in tiles.corners]
    assert batches[0]["level"].tolist() == [0] * 8


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


# --- In order, in threads


def test_results_come_in_order_and_no_more_than_a_few_ahead():
    started, taken, most = [], 0, 0
    lock = threading.Lock()

    def work(item):
        with lock:
            started.append(item)
        time.sleep(0.001 * (item % 3))
        return item

    for result in in_order(work, range(100), threads=3):
        assert result == taken
        taken += 1
        most = max(most, len(started) - taken)
    assert taken == 100
    assert most <= 7


def test_an_error_in_a_thread_ends_it():
    def work(item):
        if item == 5:
            raise ValueError("five")
        return item

    found = []
    with pytest.raises(ValueError, match="five"):
        found.extend(in_order(work, iter(range(10**9)), threads=2))
    assert threading.active_count() < 20


# --- Real slides


def test_a_real_slide(data, normalize):
    path = data / "slides/small_HE.svs"
    with Slide(path) as slide, openslide.OpenSlide(path) as truth:
        assert slide.dimensions == truth.dimensions == (2220, 2967)
        assert slide.mpp == (0.499, 0.499)
        assert slide.objective == 20
        region = np.asarray(truth.read_region((500, 600), 0, (700, 800)))[..., :3]
        assert np.array_equal(slide.read(500, 600, 700, 800).permute(1, 2, 0).numpy(), region)
        fixed, tiles = slide_normalizer(slide, normalize)
        assert 40 <= tiles <= 80
        assert fixed.offset.norm() < 10


def test_the_offset_finds_a_known_shift(tmp_path, normalize):
    """The same tissue in another lab's colors, but for the error of the estimate."""
    offsets = {}
    for name in LABS:
        with Slide(make_slide(tmp_path / "a.svs", tissue(1024, 1024, name))) as slide:
            fixed, _ = slide_normalizer(slide, normalize)
            offsets[name] = fixed.offset
            again = fixed(slide.read(0, 0, 1024, 1024))
        assert normalize.for_slide([again]).offset.norm() < fixed.offset.norm() / 2
    assert (offsets["lab_a"] - offsets["lab_b"]).norm() > 10


def test_a_model_over_a_slide(slide_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    x, y, logits = (torch.cat(column) for column in zip(*slide_resnet.predict(slide_path, model, "cpu"), strict=True))
    tiles = SlideTiles(slide_path, NormalizeStain.pretrained(), side=224, mpp=0.5)
    assert list(zip(x.tolist(), y.tolist(), strict=True)) == tiles.corners
    imagenet = v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    assert torch.allclose(logits[5], model(imagenet(tiles[5]["image"][None] / 255))[0], atol=1e-4)
