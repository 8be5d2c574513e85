import os
import re
import signal
import sys
import time
from itertools import pairwise

import numpy as np
import openslide
import pytest
import tifffile
import tiffslide
import torch
from conftest import COMMAND, in_a_terminal, make_slide, save, tissue
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_faults import rows
from test_slides import damage, swapped_profile

from stainnorm_transform import NormalizeStain
from stainnorm_transform.cli import main
from stainnorm_transform.color import shift_ab
from stainnorm_transform.pyramid import level_sizes
from stainnorm_transform.slide_files import SlideFormat, write_slide
from stainnorm_transform.slides import Slide, slide_normalizer

LOSSLESS = SlideFormat(quality=None)


@pytest.fixture(scope="module")
def normalize():
    network = NormalizeStain.pretrained().network
    return NormalizeStain(network, target="test|ed", offset=torch.tensor([0.0, 12.0, -15.0]))


def write(path, out, normalize, file_format=LOSSLESS, threads=2):
    with Slide(path) as slide:
        write_slide(slide, out, normalize, file_format, threads)
    return out


def levels_of(path):
    """The pixels of every level, by tifffile."""
    with tifffile.TiffFile(path) as tiff:
        return [level.asarray() for level in tiff.series[0].levels]


def by_openslide(path, level=0):
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]).convert("RGB"))


def halved(pixels):
    """Means of two by two pixels, of an odd last row or column with itself, rounded half up."""
    padded = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge").astype(int)
    total = padded[::2, ::2] + padded[1::2, ::2] + padded[::2, 1::2] + padded[1::2, 1::2]
    return ((total + 2) // 4).astype(np.uint8)


# --- What is written


@pytest.mark.parametrize("ome", [False, True])
@pytest.mark.parametrize(("height", "width"), [(1300, 2100), (1024, 1024), (512, 512), (513, 511), (37, 2500), (1, 1)])
def test_it_is_the_tile_transform_with_the_same_offset_in_every_level(tmp_path, normalize, height, width, ome):
    """So there are no seams between tiles, blocks, or levels."""
    pixels = tissue(height, width)
    path = make_slide(tmp_path / "a.svs", pixels, levels=())
    out = write(path, tmp_path / "out.tif", normalize, SlideFormat(quality=None, ome=ome))
    expected = shift_ab(torch.from_numpy(pixels).permute(2, 0, 1), -normalize.offset[1:]).permute(1, 2, 0).numpy()
    levels = levels_of(out)
    assert [level.shape[1::-1] for level in levels] == level_sizes(width, height)
    # The table rounds rare pixels to the next level.
    difference = np.abs(levels[0].astype(int) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 1e-4
    for larger, smaller in pairwise(levels):
        assert np.array_equal(smaller, halved(larger))
    if not ome:
        for number, level in enumerate(levels):
            assert np.array_equal(by_openslide(out, number), level)


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


@pytest.mark.parametrize(("quality", "most"), [(95, 2), (90, 3), (80, 5), (30, 10)])
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
        assert page.tags["YCbCrSubSampling"].value == ((1, 1) if quality >= 90 else (2, 2))


def test_openslide_finds_metadata_and_images(tmp_path, normalize):
    path = make_slide(tmp_path / "a.svs", tissue(1100, 1500), mpp=0.2528, objective=40, iccprofile=b"a profile" * 20)
    out = write(path, tmp_path / "out.tif", normalize)
    with openslide.OpenSlide(out) as slide:
        properties = slide.properties
        assert properties["openslide.vendor"] == "aperio"
        assert float(properties["openslide.mpp-x"]) == float(properties["openslide.mpp-y"]) == 0.2528
        assert properties["openslide.objective-power"] == "40"
        assert properties["aperio.Stain target"] == "test?ed"
        assert (properties["aperio.Offset a"], properties["aperio.Offset b"]) == ("12.000", "-15.000")
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
        assert "Offset a = 12.000" in image["Description"]
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
        fixed, _ = slide_normalizer(slide, NormalizeStain.pretrained())
        raw = slide.read(0, 0, *slide.dimensions)
    expected = fixed(raw).permute(1, 2, 0).numpy().astype(int)
    for file_format, most in ((LOSSLESS, 0), (SlideFormat(90), 1.5), (SlideFormat(90, ome=True), 1.5)):
        out = write(path, tmp_path / "out.tif", fixed, file_format)
        assert np.abs(levels_of(out)[0] - expected).mean() <= most
        assert by_openslide(out).shape == (2967, 2220, 3)


# --- The command


def test_slides_beside_tiles(run, tmp_path, random_normalize, capsys):
    make_slide(tmp_path / "in/deep/a.svs", tissue(600, 700), objective=40, mpp=0.25)
    make_slide(tmp_path / "in/b.tiff", tissue(300, 300))
    save(tmp_path / "in/c.png")
    assert run(tmp_path / "in", options=["--lossless", "--overview"]) == 0
    out = tmp_path / "out"
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert found == ["b.tif", "c.png", "deep/a.tif", "offsets.csv", "overview.png"]
    assert "3 of 3 images normalized" in capsys.readouterr().out
    with Slide(tmp_path / "in/deep/a.svs") as slide:
        fixed, _ = slide_normalizer(slide, random_normalize)
    listed = next(row for row in rows(out) if row["output"] == "deep/a.tif")
    assert [float(listed["offset_a"]), float(listed["offset_b"])] == pytest.approx(fixed.offset[1:].tolist(), abs=1e-3)
    expected = shift_ab(torch.from_numpy(tissue(600, 700)).permute(2, 0, 1), -fixed.offset[1:])
    assert np.abs(levels_of(out / "deep/a.tif")[0] - expected.permute(1, 2, 0).numpy().astype(int)).max() <= 1


def test_a_slide_is_made_again_only_when_something_changed(run, tmp_path):
    path, out = make_slide(tmp_path / "in/a.svs", tissue(300, 300)), tmp_path / "out/a.tif"

    def done(*options):
        before = out.stat().st_mtime_ns if out.exists() else None
        assert run(tmp_path / "in", options=options) == 0
        return out.stat().st_mtime_ns != before

    assert done()
    assert not done()
    assert not done("--threads", "1")
    for options in (
        ["--quality", "80"],
        ["--lossless"],
        ["--keep-label"],
        ["--srgb"],
        ["--offset=1,2"],
        ["--offset=1,3"],
    ):
        assert done(*options)
        assert not done(*options)
    make_slide(path, tissue(310, 300))
    assert done("--offset=1,3")


def test_ome_tiff_has_a_name_of_its_own(run, tmp_path):
    make_slide(tmp_path / "in/a.svs", tissue(300, 300))
    assert run(tmp_path / "in", options=["--ome"]) == 0
    assert run(tmp_path / "out/a.ome.tif", out="again", options=["--ome"]) == 0
    assert run(tmp_path / "out/a.ome.tif", out="again") == 0
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"a.ome.tif", "a.tif", "offsets.csv"}


def test_given_offsets(run, tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        make_slide(tmp_path / f"in/{name}.svs", tissue(300, 300))
    save(tmp_path / "in/c.png")
    assert run(tmp_path / "in", options=["--offset=-3.5,20"]) == 0
    assert {(row["offset_a"], row["offset_b"]) for row in rows(tmp_path / "out")} == {("-3.500", "20.000")}
    table = tmp_path / "table.csv"
    table.write_text(
        f"input,offset_a,offset_b\na.svs,1,2\n{tmp_path}/in/b.svs,3,4\nx/b.svs,9,9\nb.svs,8,8\nc.png,5,6\n"
    )
    assert run(tmp_path / "in", out="csv", options=["--offset", str(table)]) == 0
    found = {row["output"]: (row["offset_a"], row["offset_b"]) for row in rows(tmp_path / "csv")}
    assert found == {"a.tif": ("1.000", "2.000"), "b.tif": ("3.000", "4.000"), "c.png": ("5.000", "6.000")}
    # The record of a run is such a file.
    assert run(tmp_path / "in", out="same", options=["--offset", str(tmp_path / "csv/offsets.csv")]) == 0
    assert {row["output"]: (row["offset_a"], row["offset_b"]) for row in rows(tmp_path / "same")} == found
    # A file of the same name in another folder is another file; spreadsheets begin with a mark.
    table.write_text("\ufeffinput,offset_a,offset_b\nin/a.svs,1,2\nx/b.svs,9,9\nc.png,5,6\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "in", out="part", options=["--offset", str(table)]) == 1
    assert f"b.svs: it is not in {table}" in capsys.readouterr().err
    assert {row["output"]: row["offset_a"] for row in rows(tmp_path / "part")} == {"a.tif": "1.000", "c.png": "5.000"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1", "expected two finite numbers, as in --offset=3.5,-2, or a CSV file that is there, got '1'"),
        ("1,nan", "expected two finite numbers"),
        ("table.csv", "line 2: expected two finite numbers, got 1, inf"),
        ("long.csv", "field larger than field limit"),
        ("other.csv", "expected columns input, offset_a and offset_b, got no input"),
    ],
)
def test_offsets_that_are_none_are_refused(run, tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("input,offset_a,offset_b\na.svs,1,inf\n")
    (tmp_path / "other.csv").write_text("x,offset_a,offset_b\n")
    (tmp_path / "long.csv").write_text("x" * 200_000 + "\n")
    save(tmp_path / "in/c.png")
    assert run(tmp_path / "in", options=[f"--offset={text}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_blank_slides_keep_their_colors_and_that_is_said(run, tmp_path, capsys):
    pixels = np.full((700, 600, 3), (240, 238, 243), np.uint8)
    path = make_slide(tmp_path / "a.svs", pixels, mpp=None)
    assert run(path, options=["--lossless"]) == 0
    output = capsys.readouterr().out
    assert f"{path}: no tissue was found, colors are as they were; the slide does not say its resolution" in output
    assert np.array_equal(levels_of(tmp_path / "out/a.tif")[0], pixels)
    assert (rows(tmp_path / "out")[0]["offset_a"], rows(tmp_path / "out")[0]["offset_b"]) == ("0.000", "0.000")
    with openslide.OpenSlide(tmp_path / "out/a.tif") as slide:
        assert "openslide.mpp-x" not in slide.properties


def test_pixels_that_are_not_square_are_told(run, tmp_path, capsys):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        metadata = {"axes": "YXS", "PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5}
        file.write(tissue(900, 800), tile=(256, 256), photometric="rgb", subifds=1, metadata=metadata)
        file.write(tissue(450, 400), tile=(256, 256), photometric="rgb", subfiletype=1, metadata=None)
    assert run(tmp_path / "a.ome.tif") == 0
    assert "pixels are not square" in capsys.readouterr().out
    with openslide.OpenSlide(tmp_path / "out/a.tif") as slide:
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25 * 2**0.5, rel=1e-5)
        assert float(slide.properties["tiff.XResolution"]) == pytest.approx(40_000)
        assert float(slide.properties["tiff.YResolution"]) == pytest.approx(20_000)


def test_without_white_preserved_glass_is_shifted_too(tmp_path, normalize):
    plain = NormalizeStain(normalize.network, preserve_white=False, offset=normalize.offset)
    pixels = tissue(300, 300)
    out = write(make_slide(tmp_path / "a.svs", pixels), tmp_path / "out.tif", plain)
    expected = shift_ab(torch.from_numpy(pixels).permute(2, 0, 1), -normalize.offset[1:], preserve_white=False)
    assert np.abs(levels_of(out)[0] - expected.permute(1, 2, 0).numpy().astype(int)).max() <= 1


def test_colors_become_srgb_if_asked(run, tmp_path):
    path = make_slide(tmp_path / "a.svs", tissue(300, 300), iccprofile=swapped_profile())
    assert run(path, options=["--lossless", "--offset=0,0"]) == 0
    assert np.array_equal(levels_of(tmp_path / "out/a.tif")[0], tissue(300, 300))
    assert run(path, options=["--lossless", "--offset=0,0", "--srgb"]) == 0
    assert np.abs(levels_of(tmp_path / "out/a.tif")[0] - tissue(300, 300)[..., ::-1].astype(int)).max() <= 2


def test_bad_slides_are_named_and_the_others_done(run, tmp_path, capsys):
    good = make_slide(tmp_path / "in/good.svs", tissue(1100, 1500))
    for number, tile in enumerate((0, 3, 20)):
        damage(make_slide(tmp_path / f"in/damaged{number}.svs", tissue(1100, 1500)), tile=tile)
    (tmp_path / "in/none.ndpi").write_bytes(b"abc")
    (tmp_path / "in/short.svs").write_bytes(good.read_bytes()[:9000])
    grey = np.zeros((600, 600), np.uint8)
    with tifffile.TiffWriter(tmp_path / "in/grey.tif") as file:
        for _ in range(2):
            file.write(grey, tile=(256, 256), photometric="minisblack", metadata=None)
    assert run(tmp_path / "in") == 1
    captured = capsys.readouterr()
    assert "1 of 7 images normalized" in captured.out
    for name in ("damaged0.svs", "damaged1.svs", "damaged2.svs"):
        assert f"{name}: damaged at x = " in captured.err
    assert "none.ndpi: not a slide of a format that OpenSlide reads" in captured.err
    assert "short.svs: " in captured.err
    assert "grey.tif: expected 8-bit RGB, got 8 bits and 1 channel a page" in captured.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"good.tif", "offsets.csv"}
    assert "Traceback" not in captured.err


def test_inputs_are_no_outputs(run, tmp_path, capsys):
    path = make_slide(tmp_path / "in/a.tif", tissue(300, 300))
    before = path.read_bytes()
    assert run(tmp_path / "in", out="in") == 2
    assert "is an input, whose files would be overwritten" in capsys.readouterr().err
    assert run(path, out="in") == 2
    assert "is an input and would be overwritten" in capsys.readouterr().err
    assert path.read_bytes() == before
    make_slide(tmp_path / "in/a.svs", tissue(300, 300))
    assert run(tmp_path / "in") == 2
    assert "would both be written to" in capsys.readouterr().err


def test_a_full_disk_leaves_no_part_of_a_slide(run, tmp_path, small_disk, capsys):
    disk, remount = small_disk
    pixels = tissue(1100, 1500)
    size = write(make_slide(tmp_path / "in/a.svs", pixels), tmp_path / "x.tif", None, SlideFormat()).stat().st_size
    remount(f"size={int(0.9 * size) // 4096 * 4096}")
    assert run(tmp_path / "in", out="disk/out") == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "the same command goes on from here" in error
    assert {path.name for path in (disk / "out").iterdir()} == {"offsets.csv"}
    remount("size=30m")
    assert run(tmp_path / "in", out="disk/out") == 0
    assert levels_of(disk / "out/a.tif")[0].shape == (1100, 1500, 3)


@pytest.mark.parametrize("threads", ["3"])
def test_a_full_disk_while_many_blocks_wait(start, tmp_path, small_disk, threads):
    """Threads must not read from a slide that has been closed: OpenSlide would end the process."""
    disk, _ = small_disk
    make_slide(tmp_path / "in/a.svs", tissue(6000, 6000), compression="jpeg")
    process = start(tmp_path / "in", "--threads", threads, out=disk / "out")
    _, error = process.communicate()
    assert process.returncode == 2, error
    assert b"No space left on device: '" + os.fsencode(disk / "out/a.tif") in error
    assert {path.name for path in (disk / "out").iterdir()} == {"offsets.csv"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_whole_slides_only(run, start, tmp_path, capsys, number):
    for name in "abcd":
        make_slide(tmp_path / f"in/{name}.svs", tissue(2500, 2500))
    out = tmp_path / "out"
    process = start(tmp_path / "in", "--threads", "1")
    while not (out / "a.tif").exists() or not any(part.stat().st_size for part in out.glob(".stainnorm-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert b"interrupted; what was finished is kept" in error
        assert b"Traceback" not in error
        assert not list(out.glob(".stainnorm-*"))
    done = sorted(out.glob("*.tif"))
    assert 1 <= len(done) < 4
    before = {path: path.stat().st_mtime_ns for path in done}
    for path in done:
        assert levels_of(path)[0].shape == (2500, 2500, 3)
    assert run(tmp_path / "in") == 0
    assert (
        f"4 of 4 images normalized to 'test' in {out}, {len(done)} of them by an earlier run" in capsys.readouterr().out
    )
    assert {path.name for path in out.iterdir()} == {"a.tif", "b.tif", "c.tif", "d.tif", "offsets.csv"}
    assert {path: path.stat().st_mtime_ns for path in done} == before


def test_slides_without_the_packages_are_named(run, tmp_path, monkeypatch, capsys):
    make_slide(tmp_path / "in/a.svs", tissue(300, 300))
    save(tmp_path / "in/c.png")
    monkeypatch.setitem(sys.modules, "openslide", None)
    assert run(tmp_path / "in") == 2
    assert 'slides take more packages: pip install "stainnorm-transform[slides]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", ""], "got an empty name"),
        (["--quality", "0"], "expected a JPEG quality from 1 to 100, got 0"),
        (["--threads", "0"], "expected a number of 1 or more, got '0'"),
        (["--quality", "80", "--lossless"], "not allowed with argument"),
    ],
)
def test_options_that_cannot_be_are_refused(trained, tmp_path, capsys, options, message):
    save(tmp_path / "a.png")
    arguments = ["normalize", str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--weights", str(trained)]
    try:
        status = main([*arguments, *options])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_progress_shows_pixels_a_second_and_the_time_left(trained, tmp_path):
    path = make_slide(tmp_path / "in/a.svs", tissue(5000, 5000), compression="jpeg")
    command = [*COMMAND, path, "--weights", trained, "--out", tmp_path / "out", "--threads", "1"]
    lines = [line.replace("\x1b[A", "") for line in in_a_terminal(command, 100)]  # one line up
    bar = re.compile(r"a\.svs: +\d+%.*[\d.]+M/25\.0M \[\d+:\d\d<\d+:\d\d, +[\d.]+Mpx/s\]")
    assert any(bar.search(line) for line in lines)
    assert max(map(len, lines)) <= 100


def test_an_overview_shows_slides(run, tmp_path):
    make_slide(tmp_path / "in/a.svs", tissue(600, 900))
    assert run(tmp_path / "in", options=["--overview"]) == 0
    with Image.open(tmp_path / "out/overview.png") as sheet:
        assert sheet.width > 500
        # Both halves show tissue.
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    for half in (pixels[60:180, 10:250], pixels[60:180, 280:500]):
        assert half.std() > 15
