import csv
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from camelyon17 import read
from PIL import Image
from render_tiles import render_tile
from synthetic import png, rows, save
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform import __version__, weights
from stainnorm_transform.cli.main import main
from stainnorm_transform.folders import images, overview
from stainnorm_transform.folders.record import MAP_FIELDS


def test_folders_keep_their_structure_and_inputs_their_content(run, tmp_path, random_normalize, capsys):
    files = [save(tmp_path / "in" / name) for name in ("a.png", "deep/er/b.tif", "deep/c.TIFF", "d.jpg", "e.JPEG")]
    (tmp_path / "in/notes.txt").write_text("no image")
    before = [file.read_bytes() for file in files]
    single = save(tmp_path / "single.png")
    assert run(tmp_path / "in", single) == 0
    out = tmp_path / "out"
    outputs = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert outputs == ["a.png", "d.jpg", "deep/c.TIFF", "deep/er/b.tif", "e.JPEG", "offsets.csv", "single.png"]
    assert [file.read_bytes() for file in files] == before
    expected = random_normalize(render_tile())
    for name in ("a.png", "deep/er/b.tif", "deep/c.TIFF", "single.png"):
        assert torch.equal(read(out / name), expected)
    assert "6 of 6 images normalized to 'test'" in capsys.readouterr().out
    with (out / "offsets.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    offset = random_normalize.estimate_offset(render_tile())
    row = next(row for row in rows if row["input"] == str(single))
    assert row["output"] == "single.png"
    assert [float(row["offset_a"]), float(row["offset_b"])] == pytest.approx(offset[1:].tolist(), abs=1e-3)
    color_map = random_normalize.estimate_map(render_tile())
    assert [float(row[name]) for name in MAP_FIELDS] == pytest.approx(color_map.flatten().tolist(), abs=1e-4)
    assert color_map[:, 1:].abs().max() > 0.1


def test_resolution_profile_and_exif_are_kept(run, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, options in (("a.png", {"exif": exif}), ("a.jpg", {"exif": exif}), ("a.tif", {})):
        save(tmp_path / "in" / name, dpi=(1000, 1000), icc_profile=b"a profile", **options)
    assert run(tmp_path / "in") == 0
    for name in ("a.png", "a.jpg", "a.tif"):
        with Image.open(tmp_path / "out" / name) as image:
            assert [float(value) for value in image.info["dpi"]] == pytest.approx([1000, 1000], abs=0.1)
            assert image.info["icc_profile"] == b"a profile"
            if name != "a.tif":
                assert image.getexif()[0x0112] == 6


def test_tiff_keeps_scales_without_unit_and_their_description(run, tmp_path):
    pixels = render_tile().permute(1, 2, 0).numpy()
    description = "unit=micron"
    save_options = {"resolution": (4, 4), "resolutionunit": "none", "description": description, "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", **save_options)
    assert run(tmp_path / "a.tif") == 0
    with tifffile.TiffFile(tmp_path / "out/a.tif") as tiff:
        tags = tiff.pages[0].tags
        assert tags["XResolution"].value == (4, 1)
        assert tags["ResolutionUnit"].value == 1
        assert tags["ImageDescription"].value == description


def test_transparency_is_kept_and_counts_as_glass(run, tmp_path, random_normalize):
    tile = render_tile()
    image = to_pil_image(tile)
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 128, 40))
    image.putalpha(alpha)
    save(tmp_path / "in/a.png", image)
    assert run(tmp_path / "in") == 0
    with Image.open(tmp_path / "out/a.png") as out:
        assert out.mode == "RGBA"
        assert out.getchannel("A").tobytes() == alpha.tobytes()
    flat = tile.clone()
    flat[:, :40] = 255
    fixed = random_normalize.for_slide([flat])
    assert torch.equal(read(tmp_path / "out/a.png"), fixed(tile))


def test_palettes_are_resolved(run, tmp_path):
    image = to_pil_image(render_tile()).quantize(64)
    save(tmp_path / "a.png", image)
    assert run(tmp_path / "a.png") == 0
    with Image.open(tmp_path / "out/a.png") as out:
        assert out.mode == "RGB"


def test_a_transparent_color_becomes_transparency(run, tmp_path):
    color = tuple(render_tile()[:, 0, 0].tolist())
    save(tmp_path / "a.png", transparency=color)
    assert run(tmp_path / "a.png") == 0
    with Image.open(tmp_path / "out/a.png") as out:
        assert out.mode == "RGBA"
        assert out.getpixel((0, 0))[3] == 0


def test_the_output_folder_must_not_be_a_file(run, tmp_path, capsys):
    save(tmp_path / "a.png")
    (tmp_path / "out").write_text("")
    assert run(tmp_path / "a.png") == 2
    assert "expected a folder to write to, got" in capsys.readouterr().err


def test_blank_images_are_copied_pixel_for_pixel(run, tmp_path):
    save(tmp_path / "a.png", Image.new("RGB", (50, 40), (240, 238, 241)))
    assert run(tmp_path / "a.png") == 0
    assert torch.equal(read(tmp_path / "out/a.png"), read(tmp_path / "a.png"))


def make_bad(kind, path):
    tile = render_tile().permute(1, 2, 0).numpy()
    if kind == "truncated":
        save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "16 bits":
        tifffile.imwrite(path, tile.astype(np.uint16) * 257, photometric="rgb")
    elif kind == "16 bits, planar":
        planes = tile.transpose(2, 0, 1).astype(np.uint16) * 257
        tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate")
    elif kind == "I;16":
        save(path, Image.fromarray(tile[..., 0].astype(np.uint16) * 257))
    elif kind == "pages":
        tifffile.imwrite(path, np.stack([tile, tile]), photometric="rgb")
    else:
        save(path, to_pil_image(render_tile()).convert(kind))


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("truncated", "bad.png", "truncated"),
        ("truncated", "bad.jpg", "truncated"),
        ("truncated", "bad.tif", "truncated"),
        ("empty", "bad.png", "cannot identify"),
        ("text", "bad.tif", "cannot identify"),
        ("L", "bad.png", r"grey image \(mode L\)"),
        ("L", "bad.jpg", r"grey image \(mode L\)"),
        ("1", "bad.png", "grey"),
        ("LA", "bad.png", "grey"),
        ("I;16", "bad.png", "16 bits"),
        ("CMYK", "bad.jpg", "color model CMYK"),
        ("16 bits", "bad.tif", "16 bits a channel"),
        ("16 bits, planar", "bad.tif", "16 bits a channel"),
        ("pages", "bad.tif", "more than one page"),
    ],
)
def test_a_bad_file_is_named_and_the_rest_goes_on(run, tmp_path, capsys, kind, name, message):
    save(tmp_path / "in/a.png")
    make_bad(kind, tmp_path / "in" / name)
    save(tmp_path / "in/z.png")
    assert run(tmp_path / "in") == 1
    captured = capsys.readouterr()
    assert "2 of 3 images normalized" in captured.out
    line = next(line for line in captured.err.splitlines() if name in line)
    assert message.replace("\\", "") in line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "offsets.csv", "z.png"]


def test_16_bit_png_is_refused(run, tmp_path, capsys):
    rows = zlib.compress(2 * (b"\0" + 2 * 3 * b"\x12\x34"))
    (tmp_path / "a.png").write_bytes(png(2, 2, (b"IDAT", rows), bits=16))
    assert run(tmp_path / "a.png") == 1
    assert "16 bits a channel" in capsys.readouterr().err


def test_decompression_bombs_are_refused(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    save(tmp_path / "a.png")
    assert run(tmp_path / "a.png") == 1
    printed = capsys.readouterr().err
    assert "a.png: more than 2,000 pixels, the limit against decompression bombs: convert it to a tiled TIFF" in printed


def test_other_files_are_refused_by_name(run, tmp_path, capsys):
    (tmp_path / "notes.txt").write_bytes(b"abc")
    assert run(tmp_path / "notes.txt") == 1
    assert "notes.txt: expected a file ending in .png, .jpg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "inputs", "message"),
    [
        ("", ["nowhere"], "nowhere does not exist"),
        ("empty/notes.txt", ["empty"], "no images (.png, .jpg, .jpeg, .tif, .tiff, .bmp, .webp, .jp2, .j2k, .svs, "),
    ],
)
def test_nothing_is_written_where_the_plan_is_wrong(run, tmp_path, capsys, make, inputs, message):
    for name in make.split():
        save(tmp_path / name) if name.endswith("png") else (tmp_path / "empty").mkdir()
    assert run(*(tmp_path / name for name in inputs)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_for_one_place_fail_by_name_and_the_rest_is_done(run, tmp_path, capsys):
    clashing = [save(tmp_path / folder / "a.png") for folder in ("x", "y", "z")]
    rest = [save(tmp_path / "x/b.png"), save(tmp_path / "y/deeper/a.png")]
    for _ in range(2):
        assert run(tmp_path / "x", tmp_path / "y", tmp_path / "z") == 1
        printed = capsys.readouterr()
        assert "2 of 5 images normalized" in printed.out
        for path, other in zip(clashing, [clashing[1], *clashing[:1] * 2], strict=True):
            assert f"  {path}: {other} would be written to {tmp_path}/out/a.png as well: rename one" in printed.err
    assert "2 of them by an earlier run" in printed.out
    assert {row["input"] for row in rows(tmp_path / "out")} == set(map(str, rest))
    # What an earlier run made of one of them stays.
    assert run(tmp_path / "x", out="second") == 0
    before = (tmp_path / "second/a.png").stat()
    assert run(tmp_path / "x", tmp_path / "y", out="second", options=["--again"]) == 1
    assert (tmp_path / "second/a.png").stat() == before


def test_inputs_are_never_overwritten(run, tmp_path, capsys):
    path = save(tmp_path / "in/a.png")
    before = path.read_bytes()
    assert run(tmp_path / "in", out="in") == 2
    assert "would be overwritten" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert run(path, out="link") == 2
    assert path.read_bytes() == before


def test_an_output_folder_inside_the_input_is_not_searched(run, tmp_path):
    save(tmp_path / "in/a.png")
    for _ in range(2):
        assert run(tmp_path / "in", out="in/out") == 0
    assert sorted(path.name for path in (tmp_path / "in/out").rglob("*.png")) == ["a.png"]


def test_a_failed_write_leaves_the_old_output_and_no_temporary_file(run, tmp_path, monkeypatch, capsys):
    save(tmp_path / "a.png")
    assert run(tmp_path / "a.png") == 0
    before = (tmp_path / "out/a.png").read_bytes()
    original = Image.Image.save

    def fail(self, path, **options):
        original(self, path, **options)
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    assert run(tmp_path / "a.png", options=["--again"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert (tmp_path / "out/a.png").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "offsets.csv"]


def test_overview_shows_pairs(run, tmp_path):
    for index in range(40):
        save(tmp_path / f"in/{index:02}.png", to_pil_image(render_tile(index, 32)))
    assert run(tmp_path / "in", options=["--overview"]) == 0
    with Image.open(tmp_path / "out/overview.png") as sheet:
        assert sheet.size == (3 * (2 * 256 + 3 * 8), 8 * (256 + 18 + 8))


def test_the_overview_never_replaces_an_image(run, tmp_path, capsys):
    save(tmp_path / "in/overview.png")
    assert run(tmp_path / "in", options=["--overview"]) == 2
    assert "overview.png, which is for something else: rename it" in capsys.readouterr().err
    assert run(tmp_path / "in") == 0


def test_odd_names_are_kept(run, tmp_path):
    names = ["ünï ✓.png", "line\nbreak.png", os.fsdecode(b"\xe9.png"), "x" * 240 + ".png"]
    for name in names:
        save(tmp_path / "in" / name)
    assert run(tmp_path / "in", options=["--overview"]) == 0
    assert {*names, "offsets.csv", "overview.png"} == {path.name for path in (tmp_path / "out").iterdir()}


def test_the_same_file_twice_is_one(run, tmp_path, monkeypatch, capsys):
    save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert run("a.png", tmp_path / "a.png") == 0
    assert "1 of 1 images" in capsys.readouterr().out


def test_interrupted_it_keeps_and_tells_what_was_done(run, tmp_path, monkeypatch, capsys):
    save(tmp_path / "in/a.png")
    (tmp_path / "in/b.png").write_bytes(b"")
    save(tmp_path / "in/c.png")
    read_image = images.read

    def interrupt(path):
        if path.name == "c.png":
            raise KeyboardInterrupt
        return read_image(path)

    monkeypatch.setattr(images, "read", interrupt)
    assert run(tmp_path / "in") == 130
    captured = capsys.readouterr()
    assert "1 of 3 images" in captured.out
    assert "b.png: cannot identify" in captured.err
    assert "interrupted" in captured.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "offsets.csv"]
    assert len((tmp_path / "out/offsets.csv").read_text().splitlines()) == 2


def test_contact_sheet_keeps_thumbnails_and_long_captions():
    before, after = Image.new("RGB", (500, 250), "red"), Image.new("RGBA", (10, 20), (0, 0, 255, 255))
    sheet = overview.contact_sheet([("name " * 100, overview.thumbnail(before), overview.thumbnail(after))])
    colors = {color: count for count, color in sheet.getcolors(10**6)}
    assert colors[(255, 0, 0)] == 256 * 128
    assert colors[(0, 0, 255)] == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "nothing"], "expected the name of shipped weights"),
        (["--weights", "none.safetensors"], "none.safetensors"),
        (["--device", "warp"], "expected a device that is here, like cpu or cuda:0, got 'warp'"),
    ],
)
def test_bad_options(run, tmp_path, capsys, options, message):
    save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", options=options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_list_names_the_default(capsys):
    assert main(["list"]) == 0
    assert f"{weights.DEFAULT} (default)" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["normalize"], ["list"]])
def test_help_fits_the_terminal(arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: stainnorm" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_the_command_is_installed():
    command = [Path(sys.executable).with_name("stainnorm"), "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"stainnorm {__version__}\n"


def test_what_is_left_out_is_counted_by_kind(run, tmp_path, capsys):
    folder = tmp_path / "in"
    save(folder / "a.png")
    (folder / "deeper").mkdir()
    for name in ("b.GIF", "deeper/c.gif", "e.vsi", "notes", "IM.0001", "IM.0002", ".hidden"):
        (folder / name).write_bytes(b"x")
    save(folder / "slide/data.png")  # as a MIRAX slide has them
    (folder / "slide.mrxs").write_bytes(b"x")
    assert run(folder) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 images normalized" in printed
    assert "Left out 6 files of kinds that are not read: 2 .gif, 1 .vsi, 3 others\n" in printed
    assert run(folder / "a.png") == 0
    assert "Left out" not in capsys.readouterr().out


def test_results_below_an_input_folder_are_no_inputs(run, tmp_path, capsys):
    save(tmp_path / "in/a.png")
    assert run(tmp_path / "in", out="in/first") == 0
    capsys.readouterr()
    assert run(tmp_path / "in", out="in/second") == 0
    assert f"(to normalize them, name them as INPUT):\n  {tmp_path}/in/first\n" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "in/second").iterdir()} == {"a.png", "offsets.csv"}
    # Given by name, they are.
    assert run(tmp_path / "in/first", out="again") == 0


@pytest.mark.parametrize("folder", ["edge_cases", "monuseg/images"])
def test_real_images_go_through(data, run, tmp_path, folder):
    assert run(data / folder) == 0
    for path in (data / folder).iterdir():
        before, after = read(path), read(tmp_path / "out" / path.name)
        assert before.shape == after.shape
        if "no-tissue" in path.name:
            assert torch.equal(before, after)
