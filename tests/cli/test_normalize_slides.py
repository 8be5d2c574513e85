"""The command normalize, on slides."""

import csv
import re
import signal
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
import torch
from apart import Stop, in_a_terminal
from PIL import Image
from synthetic import (
    damage,
    levels_of,
    make_slide,
    rows,
    save,
    swapped_profile,
    tissue,
)

from stainnorm_transform import NormalizeStain
from stainnorm_transform.cli.main import main
from stainnorm_transform.color import shift_ab
from stainnorm_transform.folders import FileNormalizer, Settings
from stainnorm_transform.folders.record import MAP_FIELDS
from stainnorm_transform.slides import Slide, SlideFormat, slide_normalizer, write_slide
from stainnorm_transform.slides.profile import color_cube, color_profile


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
        fixed, offset, _, *_ = slide_normalizer(slide, random_normalize)
    listed = next(row for row in rows(out) if row["output"] == "deep/a.tif")
    assert [float(listed["offset_a"]), float(listed["offset_b"])] == pytest.approx(offset.tolist(), abs=1e-3)
    assert map_in(listed) == pytest.approx(fixed.fixed_map.flatten().tolist(), abs=1e-4)
    assert fixed.fixed_map[:, 1:].abs().max() > 0.1
    # The slide carries it as well.
    with openslide.OpenSlide(out / "deep/a.tif") as slide:
        written = [slide.properties[f"aperio.Stain map {channel}"].split() for channel in "ab"]
    assert [float(value) for row in written for value in row] == pytest.approx(map_in(listed), abs=1.01e-4)
    expected = shift_ab(torch.from_numpy(tissue(600, 700)).permute(2, 0, 1), -fixed.fixed_map)
    assert np.abs(levels_of(out / "deep/a.tif")[0] - expected.permute(1, 2, 0).numpy().astype(int)).max() <= 1


def map_in(row):
    return [float(row[name]) for name in MAP_FIELDS]


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
        ["--mpp", "0.5"],
        ["--offset=1,2"],
        ["--offset=1,3"],
    ):
        assert done(*options)
        assert not done(*options)
    make_slide(path, tissue(310, 300))
    assert done("--offset=1,3")


def test_profiles_are_written_instead_of_slides(run, tmp_path, trained, capsys):
    path = make_slide(tmp_path / "in/deep/a.svs", tissue(600, 700))
    make_slide(tmp_path / "in/b.svs", np.full((300, 300, 3), 240, np.uint8))
    options = ["--icc"]
    assert run(tmp_path / "in", options=options) == 0
    out = tmp_path / "out"
    found = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    assert found == ["b.cube", "b.icc", "deep/a.cube", "deep/a.icc", "offsets.csv"]
    assert "b.svs: no tissue was found" in capsys.readouterr().out
    with Slide(path) as slide:
        fixed = slide_normalizer(slide, NormalizeStain.pretrained(trained)).normalize
        assert (out / "deep/a.icc").read_bytes() == color_profile(slide, fixed)
    assert (out / "deep/a.cube").read_text() == color_cube(fixed)
    before = (out / "deep/a.icc").stat().st_mtime_ns
    assert run(tmp_path / "in", options=options) == 0
    assert (out / "deep/a.icc").stat().st_mtime_ns == before
    # The maps in the record are those of a slide that is written.
    assert run(path, out="slides") == 0
    assert map_in(rows(tmp_path / "slides")[0]) == map_in(next(row for row in rows(out) if "a.icc" in row["output"]))


def test_what_has_no_profile_is_named(run, tmp_path, capsys):
    make_slide(tmp_path / "in/a.svs", tissue(300, 300), iccprofile=b"no profile")
    save(tmp_path / "in/b.png")
    (tmp_path / "out").mkdir()
    mine = tmp_path / "out/c.cube"
    mine.write_text("mine")
    make_slide(tmp_path / "in/c.svs", tissue(300, 300))
    assert run(tmp_path / "in", options=["--icc"]) == 1
    told = capsys.readouterr().err
    assert "a.svs: its ICC profile cannot be used" in told
    assert "b.png: expected a slide, got an image, which has no profile of its own: leave out --icc" in told
    assert "c.cube would be written, which is there and was not made by this command" in told
    assert mine.read_text() == "mine"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["c.cube", "offsets.csv"]


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
    assert all(map_in(row) == [-3.5, 0, 0, 0, 20, 0, 0, 0] for row in rows(tmp_path / "out"))
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
    assert all(not any(map_in(row)[1:4] + map_in(row)[5:]) for row in rows(tmp_path / "same"))
    # A file of the same name in another folder is another file; spreadsheets begin with a mark.
    table.write_text("\ufeffinput,offset_a,offset_b\nin/a.svs,1,2\nx/b.svs,9,9\nc.png,5,6\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "in", out="part", options=["--offset", str(table)]) == 1
    assert f"b.svs: {table} has no line for it: neither its full path nor its name" in capsys.readouterr().err
    assert {row["output"]: row["offset_a"] for row in rows(tmp_path / "part")} == {"a.tif": "1.000", "c.png": "5.000"}


def test_a_name_that_could_be_several_files_is_refused(run, tmp_path, capsys):
    for folder in ("x", "y"):
        save(tmp_path / "in" / folder / "a.png")
    table = tmp_path / "table.csv"
    table.write_text("input,offset_a,offset_b\na.png,1,2\n")
    assert run(tmp_path / "in", options=["--offset", str(table)]) == 2
    told = capsys.readouterr().err
    assert f"has a.png without a folder, which could be {tmp_path}/in/x/a.png or {tmp_path}/in/y/a.png" in told
    assert not (tmp_path / "out").exists()
    # One of them with its path leaves the name to the other.
    table.write_text(f"input,offset_a,offset_b\na.png,1,2\n{tmp_path}/in/y/a.png,3,4\n")
    assert run(tmp_path / "in", options=["--offset", str(table)]) == 0
    found = {row["output"]: row["offset_a"] for row in rows(tmp_path / "out")}
    assert found == {"x/a.png": "1.000", "y/a.png": "3.000"}


def write_table(path, table):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


def test_the_maps_of_a_run_given_back_make_the_same_files(run, tmp_path, capsys):
    make_slide(tmp_path / "in/a.svs", tissue(600, 700))
    save(tmp_path / "in/b.png")
    save(tmp_path / "in/c.png", Image.fromarray(tissue(800, 500, "lab_b")))
    glass = np.random.default_rng(0).integers(236, 246, (120, 150, 3), np.uint8)
    save(tmp_path / "in/blank.png", Image.fromarray(glass))
    assert run(tmp_path / "in", options=["--lossless"]) == 0
    assert "copied" not in capsys.readouterr().out
    given = tmp_path / "given.csv"
    table = rows(tmp_path / "out")
    write_table(given, table)
    options = ["--lossless", "--offset", str(given)]
    assert run(tmp_path / "in", out="same", options=options) == 0
    names = {"a.tif", "b.png", "c.png", "blank.png"}
    found = {row["output"]: row for row in rows(tmp_path / "same")}
    assert found.keys() == names
    for row in table:
        same = found[row["output"]]
        for name in ("input", "offset_a", "offset_b", *MAP_FIELDS):
            assert same[name] == row[name]
        # It is said that the map was given, and which.
        *_, numbers = same["made_by"].removesuffix(" lossless").partition(" offset ")
        expected = map_in(row) if any(map_in(row)) else [0, 0]
        assert [float(number) for number in numbers.split(",")] == pytest.approx(expected, abs=1e-6)
        assert " offset " not in row["made_by"]
    assert map_in(found["blank.png"]) == [0] * 8
    assert all(any(map_in(found[name])[1:4]) for name in names - {"blank.png"})
    for name in names:
        assert (tmp_path / "same" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    # A slope belongs to what a result is made by.
    capsys.readouterr()
    table[0]["map_b_by_a"] = "1.5"
    write_table(given, table)
    assert run(tmp_path / "in", out="same", options=options) == 0
    assert "3 of them by an earlier run" in capsys.readouterr().out
    assert rows(tmp_path / "same")[-1]["output"] == table[0]["output"]


def test_the_record_of_an_earlier_version_gives_offsets(run, tmp_path):
    make_slide(tmp_path / "in/a.svs", tissue(300, 300))
    save(tmp_path / "in/b.png")
    state = {"made_by": "stainnorm 0.1.0 camelyon17-center1 0123456789ab"}
    state |= dict.fromkeys(("input_bytes", "input_mtime_ns", "output_bytes", "output_mtime_ns"), "1")
    taken = {"a.svs": {"offset_a": "1.250", "offset_b": "-2.500"}, "b.png": {"offset_a": "3.000", "offset_b": "4.000"}}
    table = [{"input": str(tmp_path / "in" / name), "output": name, **taken[name], **state} for name in taken]
    write_table(tmp_path / "old.csv", table)
    header = "input,output,offset_a,offset_b,made_by,input_bytes,input_mtime_ns,output_bytes,output_mtime_ns"
    assert (tmp_path / "old.csv").read_text().splitlines()[0] == header
    assert run(tmp_path / "in", options=["--lossless", "--offset", str(tmp_path / "old.csv")]) == 0
    found = {row["output"]: row for row in rows(tmp_path / "out")}
    for name, output in (("a.svs", "a.tif"), ("b.png", "b.png")):
        a, b = (float(taken[name][column]) for column in ("offset_a", "offset_b"))
        assert map_in(found[output]) == [a, 0, 0, 0, b, 0, 0, 0]
        # As by the command line, which is seen as the same.
        assert run(tmp_path / "in" / name, out="line", options=["--lossless", f"--offset={a},{b}"]) == 0
        assert (tmp_path / "line" / output).read_bytes() == (tmp_path / "out" / output).read_bytes()
        assert rows(tmp_path / "line")[-1]["made_by"] == found[output]["made_by"]
        assert f" offset {a},{b}" in found[output]["made_by"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1", "expected two finite numbers, as in --offset=3.5,-2, or a CSV file that is there, got '1'"),
        ("1,nan", "expected two finite numbers"),
        ("table.csv", "line 2: expected finite numbers, got 1, inf"),
        ("not_finite.csv", "line 3: expected finite numbers, got 1, 2, 3, 4, 5, 6, nan, 8"),
        ("no_number.csv", "line 3: could not convert string to float: '1;5'"),
        ("not_filled.csv", "line 3: expected all columns of the map, map_a to map_b_by_b, or none of them"),
        ("no_offset.csv", "line 3: expected finite numbers, got "),
        ("long.csv", "field larger than field limit"),
        ("other.csv", "expected columns input, offset_a and offset_b, got no input"),
    ],
)
def test_offsets_that_are_none_are_refused(run, tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("input,offset_a,offset_b\na.svs,1,inf\n")
    (tmp_path / "other.csv").write_text("x,offset_a,offset_b\n")
    (tmp_path / "long.csv").write_text("x" * 200_000 + "\n")
    maps = {
        "not_finite": "1,2,3,4,5,6,nan,8",
        "no_number": "1,2,3,4,5,1;5,7,8",
        "not_filled": "1,2,3,4,5,6,7,",
        "no_offset": "1,2,3,4,5,6,7,8",
    }
    for name, values in maps.items():
        offset = "" if name == "no_offset" else "1"
        lines = [f"input,offset_a,offset_b,{','.join(MAP_FIELDS)}", "a.svs,1,2,,,,,,,,", f"c.png,1,{offset},{values}"]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
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
    (row,) = rows(tmp_path / "out")
    assert (row["offset_a"], row["offset_b"]) == ("0.000", "0.000")
    assert map_in(row) == [0] * 8
    with openslide.OpenSlide(tmp_path / "out/a.tif") as slide:
        assert "openslide.mpp-x" not in slide.properties


def test_tiled_label_masks_are_copied_to_the_byte(run, tmp_path, capsys):
    classes = np.array([(220, 120, 180), (90, 40, 140), (250, 250, 250)], np.uint8)
    mask = classes[np.indices((700, 900)).sum(0) // 100 % 3]
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "zlib", "metadata": None}
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in/mask.tiff", mask, **options)
    with tifffile.TiffWriter(tmp_path / "in/labelled.tif") as file:
        file.write(mask, **options)
        file.write(np.zeros((50, 60, 3), np.uint8), photometric="rgb", metadata=None)
    flat_in_the_middle = tissue(700, 900)
    flat_in_the_middle[200:500, 300:600] = 245
    tifffile.imwrite(tmp_path / "in/tissue.tif", flat_in_the_middle, **options)
    assert run(tmp_path / "in") == 0
    said = "few flat colors, as in a label mask: copied as it is"
    printed = capsys.readouterr().out
    assert f"{tmp_path}/in/mask.tiff: {said}\n" in printed
    assert printed.count(said) == 1
    assert (tmp_path / "out/mask.tif").read_bytes() == (tmp_path / "in/mask.tiff").read_bytes()
    # What may show a label, or tissue, is written anew.
    for name in ("labelled", "tissue"):
        assert (tmp_path / f"out/{name}.tif").read_bytes() != (tmp_path / f"in/{name}.tif").read_bytes()
        assert len(levels_of(tmp_path / f"out/{name}.tif")) > 1
    masks = [row for row in rows(tmp_path / "out") if row["output"] == "mask.tif"]
    assert [(row["offset_a"], row["offset_b"]) for row in masks] == [("0.000", "0.000")]
    assert [map_in(row) for row in masks] == [[0] * 8]


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


def test_a_resolution_can_be_given(run, tmp_path, capsys):
    """Of slides that do not say it; it is written into the result, in both layouts."""
    make_slide(tmp_path / "in/a.svs", tissue(600, 600), mpp=None)
    make_slide(tmp_path / "in/b.svs", tissue(600, 600), mpp=0.2528)
    make_slide(tmp_path / "in/c.svs", tissue(600, 600), mpp=0.5)
    assert run(tmp_path / "in") == 0
    assert (
        "a.svs: the slide does not say its resolution, nor does the result: --mpp gives it" in capsys.readouterr().out
    )
    assert run(tmp_path / "in", options=["--mpp", "0.25"]) == 1
    captured = capsys.readouterr()
    assert "resolution, nor" not in captured.out
    assert "c.svs: expected no other resolution than the slide's own, 0.5 micrometers, got 0.25" in captured.err
    for name, mpp in (("a", 0.25), ("b", 0.2528)):
        with openslide.OpenSlide(tmp_path / f"out/{name}.tif") as slide:
            assert float(slide.properties["openslide.mpp-x"]) == mpp
            assert float(slide.properties["tiff.XResolution"]) == pytest.approx(10_000 / mpp, rel=3e-6)
    assert run(tmp_path / "in/a.svs", out="ome", options=["--mpp", "0.25", "--ome"]) == 0
    with tifffile.TiffFile(tmp_path / "ome/a.ome.tif") as tiff:
        assert 'PhysicalSizeX="0.25"' in tiff.ome_metadata
    assert run(tmp_path / "in/a.svs", options=["--mpp", "0.26"]) == 0
    with openslide.OpenSlide(tmp_path / "out/a.tif") as slide:
        assert float(slide.properties["openslide.mpp-x"]) == 0.26


@pytest.mark.parametrize("kind", ["svs", "tif", "ome.tif"])
def test_damaged_parts_become_white_if_asked(run, tmp_path, capsys, kind):
    path = tmp_path / f"in/a.{kind}"
    if kind == "svs":
        make_slide(path, tissue(1100, 1500))
    else:
        path.parent.mkdir()
        with tifffile.TiffWriter(path, ome=kind == "ome.tif") as file:
            file.write(tissue(1100, 1500), tile=(240, 240), photometric="rgb", compression="zlib")
    make_slide(tmp_path / "in/good.svs", tissue(300, 300))
    damage(path)  # at x = 720, y = 0 of 240 x 240 pixels
    options = ["--lossless", "--offset=0,0"]
    assert run(tmp_path / "in", options=options) == 1
    assert "damaged at x = " in capsys.readouterr().err
    good = (tmp_path / "out/good.tif").stat().st_mtime_ns
    assert run(tmp_path / "in", options=[*options, "--skip-damaged"]) == 0
    # What was right stays.
    assert (tmp_path / "out/good.tif").stat().st_mtime_ns == good
    said = capsys.readouterr().out
    assert f"a.{kind}: 1 damaged part became white, at x = 720, y = 0 of 240 x 240 pixels" in said
    expected = tissue(1100, 1500)
    expected[:240, 720:960] = 255
    assert np.array_equal(levels_of(tmp_path / "out/a.tif")[0], expected)
    assert {row["output"]: row["made_by"].partition("lossless")[2] for row in rows(tmp_path / "out")} == {
        "a.tif": " damaged 1",
        "good.tif": "",
    }
    # It is said again, and without the option such a result is not finished.
    assert run(tmp_path / "in", options=[*options, "--skip-damaged", "--overview"]) == 0
    said = capsys.readouterr()
    assert "2 of them by an earlier run" in said.out
    assert "1 damaged part became white, in an earlier run" in said.out
    assert not said.err
    assert run(tmp_path / "in", options=options) == 1


def test_a_tiled_tiff_stays_tiled_with_its_resolution(run, tmp_path):
    options = {"photometric": "rgb", "metadata": None, "resolution": (40_000, 40_000), "resolutionunit": "centimeter"}
    tifffile.imwrite(tmp_path / "a.tif", tissue(700, 600), tile=(256, 256), compression="jpeg", **options)
    assert run(tmp_path / "a.tif") == 0
    with openslide.OpenSlide(tmp_path / "out/a.tif") as slide:
        assert slide.dimensions == (600, 700)
        assert float(slide.properties["openslide.mpp-x"]) == 0.25


def test_dicom_files_and_kinds_that_are_not_read_are_found(run, tmp_path, capsys):
    save(tmp_path / "in/a.png")
    (tmp_path / "in/1.2.840.7").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "in/DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "in/b.vsi").write_bytes(b"II*\0")
    assert run(tmp_path / "in") == 1
    said = capsys.readouterr()
    assert "1 of 2 images normalized" in said.out
    assert f"{tmp_path}/in/1.2.840.7: " in said.err
    assert (
        f"convert them to OME-TIFF or DICOM, by QuPath, bfconvert or the scanner's own program:\n  {tmp_path}/in/b.vsi"
        in said.out
    )
    assert run(tmp_path / "in/b.vsi") == 1
    assert "b.vsi: not supported: Olympus (.vsi); convert it to OME-TIFF" in capsys.readouterr().err


def test_results_of_dicom_files_keep_names_with_dots(tmp_path, trained):
    normalizer = FileNormalizer(Settings(tmp_path, str(trained)))
    for name, expected in (("1.2.840.7", "1.2.840.7.tif"), ("IM1", "IM1.tif"), ("a.b.dcm", "a.b.tif")):
        (tmp_path / name).write_bytes(bytes(128) + b"DICM")
        assert normalizer.output_name(tmp_path / name, Path(name)) == Path(expected)


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
    assert "grey.tif: expected 8-bit RGB, got 8 bits and 1 channel" in captured.err
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


def test_slides_that_differ_by_their_suffix_fail_by_name(run, tmp_path, capsys):
    for name in ("a.svs", "a.tif", "b.svs"):
        make_slide(tmp_path / "in" / name, tissue(300, 300))
    assert run(tmp_path / "in") == 1
    printed = capsys.readouterr().err
    assert "2 failed" in printed
    for name, other in (("a.svs", "a.tif"), ("a.tif", "a.svs")):
        assert f"{name}: {tmp_path}/in/{other} would be written to {tmp_path}/out/a.tif as well" in printed
    assert [row["output"] for row in rows(tmp_path / "out")] == ["b.tif"]


def test_a_full_disk_leaves_no_part_of_a_slide(run, tmp_path, small_disk, capsys):
    disk, remount = small_disk
    pixels = tissue(1100, 1500)
    with Slide(make_slide(tmp_path / "in/a.svs", pixels)) as slide:
        write_slide(slide, tmp_path / "x.tif", None, SlideFormat(), threads=2)
    size = (tmp_path / "x.tif").stat().st_size
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
    make_slide(tmp_path / "in/a.svs", tissue(4096, 4096), compression="jpeg")
    done = start(tmp_path / "in", "--threads", threads, out=disk / "out")()
    assert done.status == 2, done
    assert f"No space left on device: '{disk}/out/a.tif'" in done.err
    assert {path.name for path in (disk / "out").iterdir()} == {"offsets.csv"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_whole_slides_only(run, start, tmp_path, capsys, number):
    """In the middle of the second slide of three: a slide has six tiles of smaller levels."""
    for name in "abc":
        make_slide(tmp_path / f"in/{name}.svs", tissue(1500, 1500))
    out = tmp_path / "out"
    stopped = start(tmp_path / "in", "--threads", "1", stop=Stop("slides.pyramid.Pyramid._add", 7, number))()
    assert stopped.status == (130 if number == signal.SIGINT else -number), stopped
    if number == signal.SIGINT:
        assert "interrupted; what was finished is kept" in stopped.err
        assert "Traceback" not in stopped.err
    assert len(list(out.glob(".stainnorm-*"))) == (number == signal.SIGKILL)
    assert [path.name for path in out.glob("*.tif")] == ["a.tif"]
    before = (out / "a.tif").stat().st_mtime_ns
    assert levels_of(out / "a.tif")[0].shape == (1500, 1500, 3)
    assert run(tmp_path / "in") == 0
    assert f"3 of 3 images normalized to 'test' in {out}, 1 of them by an earlier run" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"a.tif", "b.tif", "c.tif", "offsets.csv"}
    assert (out / "a.tif").stat().st_mtime_ns == before


def test_slides_without_the_packages_are_named(run, tmp_path, monkeypatch, capsys):
    make_slide(tmp_path / "in/a.svs", tissue(300, 300))
    save(tmp_path / "in/c.png")
    monkeypatch.setitem(sys.modules, "openslide", None)
    assert run(tmp_path / "in") == 2
    assert (
        'slides need more packages: in a clone of the repository, run pip install ".[slides]"'
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", ""], "got an empty name"),
        (["--quality", "0"], "expected a JPEG quality from 1 to 100, got 0"),
        (["--mpp", "0"], "expected micrometers a pixel, from 0.01 to 100, got '0'"),
        (["--mpp", "nan"], "expected micrometers a pixel"),
        (["--threads", "0"], "expected a number of 1 or more, got '0'"),
        (["--quality", "80", "--lossless"], "not allowed with argument"),
        (["--icc", "--ome"], "not allowed with argument"),
        (["--icc", "--overview"], "expected --icc without --overview, which shows normalized files"),
        (["--icc", "--srgb"], "expected --icc without --srgb: the profile does that"),
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
    arguments = ["normalize", path, "--weights", trained, "--out", tmp_path / "out", "--threads", "1"]
    lines = [line.replace("\x1b[A", "") for line in in_a_terminal(arguments, 100)]  # one line up
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
