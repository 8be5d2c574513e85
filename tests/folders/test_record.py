"""What is done again, what is not, and the record by which that is told."""

import csv
import os
import re
from pathlib import Path

import pytest
import torch
from camelyon17 import read
from render_tiles import render_tile
from synthetic import make_tiles, rows, save
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform import NormalizeStain, TrainConfig, __version__, weights
from stainnorm_transform.folders import FileNormalizer, Settings, images, record

# Of version 0.1.0.
OLD_HEADER = "input,output,offset_a,offset_b,made_by,input_bytes,input_mtime_ns,output_bytes,output_mtime_ns\r\n"


def test_shipped_weights_are_told_as_ever():
    """Or all results would seem to be of other weights."""
    assert FileNormalizer(Settings(Path("out"), "camelyon17")).record.made_by.endswith(
        " camelyon17-center1 cb10a878d70f"
    )


def test_no_line_is_cut_by_a_full_disk(tmp_path, monkeypatch):
    made = record.Record(tmp_path, "test")
    output = save(tmp_path / "a.png")
    with made:
        before = (tmp_path / "offsets.csv").read_bytes()
        write = os.write
        monkeypatch.setattr(os, "write", lambda handle, line: write(handle, line[:5]))
        with pytest.raises(OSError, match=r"No space left on device: .*offsets\.csv"):
            made.add(made.source(output), output, [1, 2], [0] * 8, output)
        assert (tmp_path / "offsets.csv").read_bytes() == before


def test_only_what_changed_is_done_again(run, tmp_path, trained, random_normalize, random_network, capsys, monkeypatch):
    tiles, out = make_tiles(tmp_path / "in", 5), tmp_path / "out"

    def done(options=()):
        before = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
        assert run(tmp_path / "in", options=options) == 0
        capsys.readouterr()
        return sorted(path.name for path in out.glob("*.png") if before.get(path) != path.stat().st_mtime_ns)

    everything = [tile.name for tile in tiles]
    assert done() == everything
    assert done() == []
    save(tiles[0], to_pil_image(render_tile(9, 64)))  # changed
    state = tiles[1].stat()
    save(tiles[1], to_pil_image(render_tile(8, 70)))  # changed, and as old as before
    os.utime(tiles[1], ns=(state.st_atime_ns, state.st_mtime_ns))
    (out / tiles[2].name).unlink()
    with (out / tiles[3].name).open("r+b") as file:
        file.write(b"damaged, and as long as before")
    assert done() == everything[:4]
    assert done() == []
    assert torch.equal(read(out / tiles[0].name), random_normalize(render_tile(9, 64)))
    assert done(["--again"]) == everything
    with torch.no_grad():
        random_network.head.bias += 0.1
    weights.save(random_network, trained, TrainConfig(), target="test")
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert run(tmp_path / "in") == 2
    message = r"5 of the results in .* were made with other weights \(test [0-9a-f]{12}\): add --again"
    assert re.search(message, capsys.readouterr().err)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    # As if a run that replaces them had been interrupted.
    assert run(tiles[0], options=["--again"]) == 0
    assert done(["--again"]) == everything[1:]
    changed = NormalizeStain(random_network)
    # Images are done several at a time, in any order.
    for tile, row in zip(tiles, sorted(rows(out)[-5:], key=lambda row: row["input"]), strict=True):
        offset, color_map = changed.estimate_offset(read(tile)), changed.estimate_map(read(tile))
        assert [float(row["offset_a"]), float(row["offset_b"])] == pytest.approx(offset[1:].tolist(), abs=1e-3)
        taken = [float(row[name]) for name in record.MAP_FIELDS]
        assert taken == pytest.approx(color_map.flatten().tolist(), abs=1e-4)
    made_by = {row["made_by"] for row in rows(out)}
    assert len(made_by) == 2
    assert all(name.startswith(f"stainnorm {__version__} test ") for name in made_by)
    with monkeypatch.context() as patched:
        patched.setattr("stainnorm_transform.folders.normalizer.__version__", "99")
        assert done() == everything
    assert done() == everything


def test_results_of_an_earlier_version_below_an_input_are_no_inputs(run, tmp_path, capsys):
    save(tmp_path / "in/a.png")
    save(tmp_path / "in/first/a.png")
    (tmp_path / "in/first/offsets.csv").write_bytes(OLD_HEADER.encode())
    assert run(tmp_path / "in") == 0
    assert f"(to normalize them, name them as INPUT):\n  {tmp_path}/in/first\n" in capsys.readouterr().out
    assert [row["output"] for row in rows(tmp_path / "out")] == ["a.png"]


def test_weights_for_offsets_alone_are_other_weights(run, tmp_path, trained, random_network, capsys):
    """If the networks are the same, what is made of their output is not."""
    path = save(tmp_path / "a.png")
    assert run(path) == 0
    weights.save(random_network, trained, TrainConfig(slope=0), target="test")
    assert run(path) == 2
    assert "were made with other weights" in capsys.readouterr().err


def test_another_image_for_the_same_place_is_made(run, tmp_path, random_normalize):
    first, second = save(tmp_path / "x/a.png"), save(tmp_path / "y/a.png", to_pil_image(render_tile(3)))
    os.utime(first, (10**9, 10**9))
    os.utime(second, (10**9, 10**9))
    assert run(tmp_path / "x") == run(tmp_path / "y") == 0
    assert torch.equal(read(tmp_path / "out/a.png"), random_normalize(render_tile(3)))


@pytest.mark.parametrize(
    "content", ["slide,offset\na,1\n", "input,output,offset_a,offset_b\n", OLD_HEADER, "\x00", '"']
)
def test_a_file_of_the_name_of_the_record_is_not_replaced(run, tmp_path, capsys, content):
    save(tmp_path / "a.png")
    path = tmp_path / "out/offsets.csv"
    path.parent.mkdir()
    path.write_bytes(content.encode())
    assert run(tmp_path / "a.png") == 2
    said = "offsets.csv is not a record of this version, and is not replaced: move it, or choose another output folder"
    assert said in capsys.readouterr().err
    assert path.read_bytes() == content.encode()
    assert [file.name for file in path.parent.iterdir()] == ["offsets.csv"]


def test_a_line_that_was_cut_is_done_again(run, tmp_path, capsys):
    tiles, out = make_tiles(tmp_path / "in", 3), tmp_path / "out"
    assert run(tmp_path / "in") == 0
    path = out / "offsets.csv"
    listed = [row["output"] for row in rows(out)]
    assert sorted(listed) == [tile.name for tile in tiles]
    path.write_bytes(path.read_bytes()[:-20])
    assert run(tmp_path / "in") == 0
    assert "2 of them by an earlier run" in capsys.readouterr().out
    assert [row["output"] for row in rows(out)] == [*listed, listed[-1]]
    table = rows(out)
    table[0]["offset_a"], table[1]["offset_b"] = "1;5", "nan"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, record.FIELDS)
        writer.writeheader()
        writer.writerows(table)
    capsys.readouterr()
    assert run(tmp_path / "in", options=["--overview"]) == 0
    assert "1 of them by an earlier run" in capsys.readouterr().out


def test_the_same_folder_by_another_path_is_finished(run, tmp_path, monkeypatch, capsys):
    make_tiles(tmp_path / "in", 3)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "in") == run("in") == run("link") == run("./in/../link") == 0
    assert capsys.readouterr().out.count("3 of them by an earlier run") == 3


@pytest.mark.parametrize("kind", ["symlink", "hard link", "pipe", "nowhere"])
def test_the_record_is_no_way_to_other_files(run, tmp_path, capsys, kind):
    path = save(tmp_path / "a.png")
    (tmp_path / "other").write_bytes(b"")
    (tmp_path / "out").mkdir()
    where = tmp_path / "out/offsets.csv"
    if kind == "symlink":
        where.symlink_to(tmp_path / "other")
    elif kind == "hard link":
        where.hardlink_to(tmp_path / "other")
    elif kind == "pipe":
        os.mkfifo(where)
    else:
        where.symlink_to(tmp_path / "nowhere")
    assert run(path) == 2
    assert "offsets.csv" in capsys.readouterr().err
    assert (tmp_path / "other").read_bytes() == b""
    assert not (tmp_path / "nowhere").exists()
    assert list((tmp_path / "out").iterdir()) == [where]


def test_the_last_of_two_runs_with_other_weights_counts(run, tmp_path, trained, random_network, monkeypatch, capsys):
    """The other run makes the image while ours makes it, and ends first."""
    path = save(tmp_path / "a.png")
    expected = NormalizeStain(random_network)(render_tile())
    other_weights = ["--weights", str(tmp_path / "b.safetensors")]
    with torch.no_grad():
        random_network.head.bias += 0.1
    weights.save(random_network, tmp_path / "b.safetensors", TrainConfig(), target="b")
    add = record.Record.add

    def interrupted(self, *arguments):
        with monkeypatch.context() as patched:
            patched.setattr(record.Record, "add", add)
            assert run(path, options=other_weights) == 0
        add(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(record.Record, "add", interrupted)
        assert run(path) == 0
    assert len(rows(tmp_path / "out")) == 2
    capsys.readouterr()
    assert run(path) == 0
    assert "1 of them by an earlier run" in capsys.readouterr().out
    assert run(path, options=other_weights) == 2
    assert "other weights" in capsys.readouterr().err
    assert torch.equal(read(tmp_path / "out/a.png"), expected)


def test_an_input_that_changes_meanwhile_is_done_again(run, tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "a.png")
    encode = images.encode

    def change(*arguments, **options):
        save(path, to_pil_image(render_tile(5)))
        return encode(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(images, "encode", change)
        assert run(path) == 0
    assert run(path) == 0
    assert "earlier" not in capsys.readouterr().out


def test_odd_names_are_finished_by_one_run(run, tmp_path, capsys):
    names = ["a,b.png", 'a"b.png', "a\nb.png", "a\rb.png", " a.png", os.fsdecode(b"\xe9.png"), "=1+1.png"]
    for name in names:
        save(tmp_path / "in" / name)
    assert run(tmp_path / "in") == 0
    assert run(tmp_path / "in") == 0
    assert f"{len(names)} of them by an earlier run" in capsys.readouterr().out


def test_absurd_times(run, tmp_path, capsys):
    path = save(tmp_path / "a.png")
    for moment in (0, 10**9, 2**33):
        os.utime(path, (moment, moment))
        assert run(path) == run(path) == 0
        assert capsys.readouterr().out.count("1 of them by an earlier run") == 1
