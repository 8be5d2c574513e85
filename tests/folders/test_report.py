"""What the report of a run holds; how it looks and works is tested in test_report_page.py."""

import base64
import hashlib
import io
import json
import math
import os
import re
import signal
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from apart import Stop
from PIL import Image
from synthetic import make_slide, make_tiles, on_glass, rows, save, tissue

from stainnorm_transform import __version__
from stainnorm_transform.estimate import offset_of, standard_error_of, tissue_sums
from stainnorm_transform.folders import flags, overview, report
from stainnorm_transform.folders.flags import Entry, flags_of, usual_offsets
from stainnorm_transform.slides import Slide, slide_normalizer


class Page(HTMLParser):
    """The elements of a page, as a parser of HTML sees them: (name, attributes, text)."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.is_open = [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])
        self.is_open = True

    def handle_endtag(self, tag):
        self.is_open = False

    def handle_data(self, data):
        if self.is_open:
            self.elements[-1][2] += data

    def named(self, tag):
        return [(attributes, text) for name, attributes, text in self.elements if name == tag]


def page_of(out):
    return Page((out / "report.html").read_text(encoding="utf-8"))


def data_of(out):
    (text,) = [text for attributes, text in page_of(out).named("script") if attributes.get("id") == "data"]
    return json.loads(text)


def files_of(out):
    return {file["name"]: file for file in data_of(out)["files"]}


def pictures_of(out):
    """Before and after of each file, by its name."""
    texts = {a["id"]: text for a, text in page_of(out).named("script") if a.get("id", "").startswith("pictures-")}
    found = {}
    for number, file in enumerate(data_of(out)["files"]):
        if f"pictures-{number}" in texts:
            contents = map(base64.b64decode, texts[f"pictures-{number}"].split(" "))
            found[file["name"]] = [Image.open(io.BytesIO(content)).convert("RGB") for content in contents]
    return found


def difference(first, second):
    assert first.size == second.size
    return np.abs(np.asarray(first, float).mean((0, 1)) - np.asarray(second, float).mean((0, 1))).max()


def test_it_holds_every_file_with_what_the_record_says_of_it(run, tmp_path, capsys):
    for path in make_tiles(tmp_path / "in", 3):
        path.rename(path.with_name(f"a{path.name}"))
    glass = np.random.default_rng(0).normal(240, 2, (200, 300, 3)).clip(0, 255).astype(np.uint8)
    save(tmp_path / "in/deep/blank.png", Image.fromarray(glass))
    make_slide(tmp_path / "in/b.svs", tissue(600, 900))
    (tmp_path / "in/c.png").write_bytes(b"no image")
    assert run(tmp_path / "in", options=["--report"]) == 1
    out = tmp_path / "out"
    files, record = files_of(out), {Path(row["input"]).name: row for row in rows(out)}
    assert list(files) == ["a0000.png", "a0001.png", "a0002.png", "b.svs", "c.png", "deep/blank.png"]
    for name, file in files.items():
        if name == "c.png":
            assert (file["offset"], file["flags"]) == (None, ["failed"])
            assert file["message"].startswith("cannot identify image file")
            continue
        row = record[Path(name).name]
        assert file["offset"] == [float(row["offset_a"]), float(row["offset_b"])]
        assert str(file["tiles"] if file["tiles"] is not None else "") == row["tiles"]
    assert (record["a0000.png"]["tiles"], record["a0000.png"]["standard_error"]) == ("1", "")
    assert (record["blank.png"]["tiles"], files["deep/blank.png"]["flags"]) == ("0", ["no tissue"])
    assert files["b.svs"]["kind"] == "slide"
    assert files["b.svs"]["error"] == float(record["b.svs"]["standard_error"]) > 0
    assert files["b.svs"]["flags"] == ["few tiles"]
    shown = pictures_of(out)
    assert set(shown) == set(files) - {"c.png"}
    for name in ("a0001.png", "b.svs", "deep/blank.png"):
        results = tmp_path / "in" / name, out / record[Path(name).name]["output"]
        for picture, path in zip(shown[name], results, strict=True):
            assert max(picture.size) <= 256
            assert difference(picture, overview.picture(path)) < 2
    assert difference(*shown["b.svs"]) > 4
    run_facts = data_of(out)["run"]
    assert (run_facts["program"], run_facts["target"], run_facts["earlier"]) == (f"stainnorm {__version__}", "test", 0)
    assert record["b.svs"]["made_by"].split(" ")[3] == run_facts["weights"]
    text = (out / "report.html").read_text()
    assert str(tmp_path) not in text
    assert "in the report" not in capsys.readouterr().err


def test_files_of_earlier_runs_are_shown(run, tmp_path):
    make_tiles(tmp_path / "in", 3)
    assert run(tmp_path / "in") == 0
    save(tmp_path / "in/new.png")
    assert run(tmp_path / "in", options=["--report", "--overview"]) == 0
    assert len(pictures_of(tmp_path / "out")) == 4
    assert data_of(tmp_path / "out")["run"]["earlier"] == 3
    assert (tmp_path / "out/overview.png").is_file()
    # It is replaced by the next.
    (tmp_path / "in/new.png").unlink()
    assert run(tmp_path / "in", options=["--report"]) == 0
    assert len(pictures_of(tmp_path / "out")) == 3


def test_no_name_is_markup_or_controls_anything(run, tmp_path):
    names = [
        "<" + "/script><script>alert(1)<!--.png",
        "'\"&amp;<b>\\u003c$data.png",
        "two\nlines\u2028.png",
        "\u202egnp.exe.png",
        os.fsdecode(b"\xff\xfe.png"),
        "שלום.png",
    ]
    for name in names:
        save(tmp_path / "in" / name, Image.new("RGB", (40, 40), "pink"))
    (tmp_path / "in/<img src=x onerror=alert(1)>.png").write_bytes(b"")
    assert run(tmp_path / "in", options=["--report"]) == 1
    found = page_of(tmp_path / "out")
    kinds = [attributes.get("type") for attributes, _ in found.named("script")]
    assert kinds == ["application/json", *["text/plain"] * len(names), None]
    assert not found.named("b")
    assert not found.named("img")
    text = (tmp_path / "out/report.html").read_bytes().decode("utf-8")
    assert "alert(1)<" not in text
    files = files_of(tmp_path / "out")
    assert all(name.isprintable() for name in files)
    shown = {"</script><script>alert(1)<!--.png", names[1], "two\\nlines\\u2028.png", "\\u202egnp.exe.png"}
    assert shown | {"\\udcff\\udcfe.png", "שלום.png"} < set(files)
    assert {file["folder"] for file in files.values()} == {0, 1}


def test_nothing_but_the_page_itself_may_run_or_load(run, tmp_path):
    save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", options=["--report"]) == 0
    found = page_of(tmp_path / "out")
    (policy,) = [a["content"] for a, _ in found.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for rule, text in (("style-src", found.named("style")[0][1]), ("script-src", found.named("script")[-1][1])):
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    text = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"' ]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not [attributes for _, attributes, _ in found.elements if {"src", "style", "onclick"} & set(attributes)]


def entry(a=0.0, b=0.0, folder="x", **more):
    return Entry("name", folder, **{"is_slide": True, "offset": (a, b), "tiles": 100, "standard_error": 0.2, **more})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"offset": None, "tiles": None, "standard_error": None}, ["failed"]),
        ({"tiles": 0, "standard_error": None}, ["no tissue"]),
        ({"tiles": 1, "standard_error": None}, ["few tiles"]),
        ({"tiles": 15}, ["few tiles"]),
        ({"tiles": 16}, []),
        ({"tiles": 1, "standard_error": None, "is_slide": False}, []),
        ({"tiles": 0, "standard_error": None, "is_slide": False}, ["no tissue"]),
        ({"tiles": None, "standard_error": None}, []),
        ({"standard_error": 1.0}, []),
        ({"standard_error": 1.001}, ["tiles disagree"]),
        ({"tiles": 80, "left_out": 20}, []),
        ({"tiles": 79, "left_out": 21}, ["tiles disagree"]),
        ({"tiles": 3, "standard_error": 2.5, "damaged": 2}, ["damaged", "few tiles", "tiles disagree"]),
    ],
)
def test_flags_of_a_file_alone(changes, expected):
    assert flags_of(entry(**changes), {}) == expected
    assert set(expected) <= set(flags.FLAGS)


def test_a_file_is_far_from_the_median_of_its_folder():
    # Offsets in a* of -2 to 2: median 0, usual distance 1, so that 5 Lab units are the limit.
    close = [entry(a) for a in (-2, -1, -1, 0, 0, 0, 1, 1, 2)]
    few = [entry(50, folder="few") for _ in range(6)] + [entry(0, folder="few")]
    usual = usual_offsets([*close, entry(9, tiles=0), entry(9, tiles=None), *few])
    assert usual == {"x": (0, 0, 5)}
    assert flags_of(entry(3, 4), usual) == []
    assert flags_of(entry(3.1, 4), usual) == ["far"]
    assert flags_of(entry(9, tiles=0), usual) == ["no tissue"]
    assert flags_of(few[-1], usual) == []
    # Usual distances of 3, and 4 times that.
    wide = [entry(a, 10) for a in (-6, -3, -3, -3, 0, 3, 3, 3, 6)]
    usual = usual_offsets(wide)
    assert usual == {"x": (0, 10, 12)}
    assert [flags_of(entry(0, b), usual) for b in (-2, 22, 22.1, -2.1)] == [[], [], ["far"], ["far"]]


def test_the_standard_error_of_a_slide(tmp_path, random_normalize):
    """By its formula, over the tiles of the slide."""
    pixels = on_glass(tissue(512, 768), 1024, 1280)
    with Slide(make_slide(tmp_path / "a.svs", pixels, levels=(4,))) as slide:
        found = slide_normalizer(slide, random_normalize)
        cut = [slide.read(x, y, 256, 256) for y in (256, 512) for x in (256, 512, 768)]
    assert found.tiles == 6
    sums = [tissue_sums(random_normalize.network, tile) for tile in cut]
    weights = np.array([float(each[0, 0]) for each in sums])
    offsets = np.array([offset_of(each).tolist() for each in sums])
    mean = (weights[:, None] * offsets).sum(0) / weights.sum()
    squares = (weights**2 * ((offsets - mean) ** 2).sum(1)).sum()
    expected = math.sqrt(6 / 5 * squares) / weights.sum()
    assert found.standard_error == pytest.approx(expected, rel=1e-3)
    assert found.standard_error > 0.001


def test_the_standard_error_is_the_spread_of_estimates_from_other_tiles():
    """Offsets from many draws of 40 tiles, of a slide whose tiles differ in offset and in how much tissue they have."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        sums = torch.zeros(count, 6, 4)
        weight = torch.rand(count, generator=generator) + 0.1
        offsets = torch.tensor([3.0, -2.0]) + torch.tensor([2.0, 4.0]) * torch.randn(count, 2, generator=generator)
        sums[:, 0, 0] = weight
        sums[:, 4:, 0] = weight[:, None] * offsets
        return sums

    estimates = torch.stack([offset_of(draw(40).sum(dim=0)) for _ in range(4000)])
    spread = (estimates - estimates.mean(dim=0)).pow(2).sum(dim=1).mean().sqrt()
    claimed = torch.stack([standard_error_of(draw(40)) for _ in range(400)]).pow(2).mean().sqrt()
    assert float(claimed) == pytest.approx(float(spread), rel=0.05)
    assert standard_error_of(draw(1)).isnan()
    assert standard_error_of(torch.zeros(0, 6, 4)).isnan()


def test_what_is_given_or_copied_rests_on_no_tiles(run, tmp_path):
    save(tmp_path / "in/a.png")
    make_slide(tmp_path / "in/b.svs", tissue(300, 300))
    save(tmp_path / "in/mask.png", Image.new("RGB", (64, 64), "red"))
    assert run(tmp_path / "in", options=["--report", "--offset=3,-4"]) == 0
    assert {(row["tiles"], row["standard_error"]) for row in rows(tmp_path / "out")} == {("", "")}
    files = files_of(tmp_path / "out")
    assert (files["a.png"]["offset"], files["b.svs"]["tiles"], files["b.svs"]["flags"]) == ([3, -4], None, [])
    assert "copied as it is" in files["mask.png"]["message"]
    assert data_of(tmp_path / "out")["run"]["given"]
    # As a table of offsets the record is read as ever.
    options = ["--report", "--offset", str(tmp_path / "out/offsets.csv")]
    assert run(tmp_path / "in", out="again", options=options) == 0
    again = files_of(tmp_path / "again")
    assert [again[name]["offset"] for name in files] == [files[name]["offset"] for name in files]


def test_color_profiles_are_shown_by_what_they_do(run, tmp_path):
    make_slide(tmp_path / "in/a.svs", tissue(512, 512))
    save(tmp_path / "in/b.png")
    assert run(tmp_path / "in", options=["--icc", "--report"]) == 1
    assert run(tmp_path / "in/a.svs", out="pixels", options=["--lossless", "--report"]) == 0
    by_profile, by_pixels = pictures_of(tmp_path / "out"), pictures_of(tmp_path / "pixels")
    assert list(by_profile) == ["a.svs"]
    assert difference(by_profile["a.svs"][0], by_pixels["a.svs"][0]) == 0
    assert difference(by_profile["a.svs"][1], by_pixels["a.svs"][1]) < 2 < difference(*by_profile["a.svs"])
    assert data_of(tmp_path / "out")["run"]["profiles"]
    assert files_of(tmp_path / "out")["b.png"]["flags"] == ["failed"]


def test_a_picture_that_cannot_be_made_is_named_and_the_page_is_written(run, tmp_path, monkeypatch, capsys):
    make_tiles(tmp_path / "in", 3)
    picture = overview.picture

    def failing(path):
        if path.name == "0001.png":
            raise RuntimeError("it is gone")
        return picture(path)

    monkeypatch.setattr(report, "picture", failing)
    assert run(tmp_path / "in", options=["--report"]) == 0
    assert f"no picture in the report: {tmp_path}/in/0001.png: it is gone\n" in capsys.readouterr().err
    assert len(files_of(tmp_path / "out")) == 3
    assert list(pictures_of(tmp_path / "out")) == ["0000.png", "0002.png"]


def test_pictures_are_written_as_they_are_made(run, tmp_path, monkeypatch):
    """And not kept until the end."""
    for number in range(20):
        save(tmp_path / f"in/{number:02}.png")
    picture, sizes = overview.picture, []

    def watched(path):
        sizes.append(sum(part.stat().st_size for part in (tmp_path / "out").glob(".stainnorm-*.part")))
        return picture(path)

    monkeypatch.setattr(report, "picture", watched)
    assert run(tmp_path / "in", options=["--report", "--workers=1"]) == 0
    whole = (tmp_path / "out/report.html").stat().st_size
    assert len(sizes) == 40
    assert sizes[-1] > 0.7 * whole


def test_if_everything_failed_it_says_so(run, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"")
    assert run(tmp_path / "in", options=["--report"]) == 1
    assert [file["flags"] for file in data_of(tmp_path / "out")["files"]] == [["failed"]]


def test_what_is_no_report_is_not_replaced(run, tmp_path, capsys):
    save(tmp_path / "in/a.png")
    path = tmp_path / "out/report.html"
    path.parent.mkdir()
    (tmp_path / "mine.html").write_text("mine")
    for make in (
        lambda: path.write_text("mine"),
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("nowhere"),
        lambda: path.symlink_to(tmp_path / "mine.html"),
    ):
        make()
        assert run(tmp_path / "in", options=["--report"]) == 2
        said = "report.html is not a report of this command, and is not replaced: move it"
        assert said in capsys.readouterr().err
        assert os.listdir(path.parent) == ["report.html"]
        assert run(tmp_path / "in", out="other") == 0
        path.rmdir() if path.is_dir() else path.unlink()
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_a_link_is_replaced_and_what_it_leads_to_stays(run, tmp_path):
    save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", out="first", options=["--report"]) == 0
    first = (tmp_path / "first/report.html").read_bytes()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.html").symlink_to(tmp_path / "first/report.html")
    assert run(tmp_path / "a.png", options=["--report"]) == 0
    assert not (tmp_path / "out/report.html").is_symlink()
    assert (tmp_path / "first/report.html").read_bytes() == first


def test_a_full_disk_keeps_results_and_the_report_that_was_there(run, tmp_path, small_disk, capsys):
    disk, _ = small_disk
    make_tiles(tmp_path / "in", 2)
    assert run(tmp_path / "in", out="disk/out", options=["--report"]) == 0
    before = (disk / "out/report.html").read_bytes()
    room = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(room.f_bavail * room.f_bsize - 8192))
    assert run(tmp_path / "in", out="disk/out", options=["--report"]) == 2
    assert re.search(r"No space left on device: '.*/out/report\.html'", capsys.readouterr().err)
    assert (disk / "out/report.html").read_bytes() == before
    names = {path.name for path in (disk / "out").iterdir()}
    assert names == {"0000.png", "0001.png", "offsets.csv", "report.html"}


def test_a_run_that_is_killed_leaves_no_half_of_a_report(start, run, tmp_path):
    make_tiles(tmp_path / "in", 6)
    killed = start(tmp_path / "in", "--report", "--workers=1", stop=Stop("folders.report.picture", 7))()
    assert killed.status == -signal.SIGKILL
    assert not (tmp_path / "out/report.html").exists()
    assert run(tmp_path / "in", options=["--report"]) == 0
    assert len(pictures_of(tmp_path / "out")) == 6
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"offsets.csv", "report.html"} | {f"{number:04}.png" for number in range(6)}
