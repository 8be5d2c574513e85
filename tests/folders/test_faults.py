"""What is there after a kill, on a full disk, and with two runs at a time; and what the next run does."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch
from apart import Stop
from camelyon17 import read
from PIL import Image
from render_tiles import render_tile
from synthetic import make_tiles, rows, save
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform.cli.main import main
from stainnorm_transform.folders import images, plan, record


def check_all_whole(out, tiles, normalize):
    """Every result of these tiles is there, right, and listed, and nothing else is there."""
    expected = {seed: normalize(render_tile(seed, 64)) for seed in range(7)}
    for tile in tiles:
        assert torch.equal(read(out / tile.name), expected[int(tile.stem) % 7])
    assert {row["output"] for row in rows(out)} == {tile.name for tile in tiles}
    assert {path.name for path in out.iterdir()} == {tile.name for tile in tiles} | {"offsets.csv"}


@pytest.mark.parametrize(("every", "workers"), [(3, 1), (3, 3), pytest.param(60, 1, marks=pytest.mark.slow)])
def test_after_a_kill_every_image_is_whole_and_the_next_run_does_the_rest(
    start, run, tmp_path, random_normalize, capsys, every, workers
):
    tiles, out = make_tiles(tmp_path / "in", 5 * every), tmp_path / "out"
    for done, place in enumerate(("images.encode", "record.Record.add", "record.Path.replace")):
        killed = start(tmp_path / "in", f"--workers={workers}", stop=Stop(f"folders.{place}", every + 1))()
        assert killed.status == -signal.SIGKILL, killed
        written = sorted(path.name for path in out.glob("*.png"))
        for name in written:
            assert read(out / name).shape == (3, 64, 64)
        listed = {row["output"] for row in rows(out)}
        assert listed >= set(written)
        if workers == 1:
            assert written == [tile.name for tile in tiles[: (done + 1) * every]]
            # The last kill falls between the line of an image and its name.
            assert len(listed) - len(written) == (done == 2)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert run(tmp_path / "in") == 0
    assert f"{len(tiles)} of {len(tiles)} images normalized to 'test'" in (text := capsys.readouterr().out)
    assert f"{len(before)} of them by an earlier run" in text
    check_all_whole(out, tiles, random_normalize)
    assert all((out / name).stat().st_mtime_ns == time for name, time in before.items())


def test_a_full_disk_stops_the_run_and_loses_nothing(run, tmp_path, small_disk, random_normalize, capsys):
    disk, remount = small_disk
    tiles = make_tiles(tmp_path / "in", 60)
    assert run(tmp_path / "in", out="disk/out") == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "the same command goes on from here" in error
    done = {path.name for path in (disk / "out").glob("*.png")}
    assert 0 < len(done) < 60
    check_all_whole(disk / "out", [tile for tile in tiles if tile.name in done], random_normalize)
    remount("size=3m")
    assert run(tmp_path / "in", out="disk/out") == 0
    assert f"{len(done)} of them by an earlier run" in capsys.readouterr().out
    check_all_whole(disk / "out", tiles, random_normalize)


def test_a_read_only_folder_is_named(run, tmp_path, small_disk, capsys):
    disk, remount = small_disk
    (disk / "out").mkdir()
    remount("ro")
    make_tiles(tmp_path / "in", 2)
    assert run(tmp_path / "in", out="disk/out") == 2
    assert "Read-only file system" in capsys.readouterr().err


@pytest.fixture
def nobody():
    """Permissions count, even for root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.fixture
def for_all(tmp_path):
    """The folder of the test, open to everybody."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder.name.startswith(("pytest-", "test_")):
            folder.chmod(0o777)
    return tmp_path


def test_what_may_not_be_read_or_written_is_named(run, for_all, trained, request, capsys):
    trained.chmod(0o644)
    for folder in (trained.parent, trained.parent.parent):
        folder.chmod(0o755)
    make_tiles(for_all / "in", 2)[0].chmod(0)
    (for_all / "locked").mkdir(mode=0o755)
    (for_all / "out").mkdir()
    (for_all / "out").chmod(0o777)
    save(for_all / "sealed/in/a.png")
    (for_all / "sealed").chmod(0)
    assert run(for_all / "in/0001.png", out="warm") == 0
    (for_all / "locked").chmod(0o555)
    request.getfixturevalue("nobody")
    capsys.readouterr()
    assert run(for_all / "in") == 1
    captured = capsys.readouterr()
    assert "1 of 2 images" in captured.out
    assert f"{for_all}/in/0000.png: Permission denied" in captured.err
    assert run(for_all / "in", out="locked") == 2
    assert "Permission denied" in capsys.readouterr().err
    assert run(for_all / "sealed", out="out") == 2
    assert "Permission denied" in capsys.readouterr().err


def test_a_file_that_vanishes_is_named(run, tmp_path, monkeypatch, capsys):
    tiles = make_tiles(tmp_path / "in", 3)
    read_image = images.read

    def vanish(path):
        tiles[1].unlink(missing_ok=True)
        return read_image(path)

    with monkeypatch.context() as patched:
        patched.setattr(images, "read", vanish)
        assert run(tmp_path / "in", options=["--overview"]) == 1
    captured = capsys.readouterr()
    assert "2 of 3 images" in captured.out
    assert f"{tiles[1]}: No such file" in captured.err
    tiles[2].unlink()
    save(tiles[1])
    assert run(tmp_path / "in") == 0
    assert {row["output"] for row in rows(tmp_path / "out")} == {tile.name for tile in tiles}


def test_two_runs_into_one_folder(start, run, tmp_path, random_normalize, capsys):
    tiles, out = make_tiles(tmp_path / "in", 30), tmp_path / "out"
    for wait in [start(tmp_path / "in") for _ in range(2)]:
        done = wait()
        assert done.status == 0, done
        assert "30 of 30 images" in done.out
    check_all_whole(out, tiles, random_normalize)
    assert 30 <= len(rows(out)) <= 60
    assert run(tmp_path / "in") == 0
    assert "30 of them by an earlier run" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_of_two_runs_the_last_line_is_that_of_the_file_that_stays(run, tmp_path, monkeypatch):
    """So no other run adds a line between that of an image and its renaming."""
    import fcntl

    make_tiles(tmp_path / "in", 2)
    replace, renamed = record.Path.replace, []

    def replace_and_look(temporary, output):
        with (tmp_path / "out/offsets.csv").open("a") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        renamed.append(output.name)
        return replace(temporary, output)

    monkeypatch.setattr(record.Path, "replace", replace_and_look)
    assert run(tmp_path / "in", options=["--workers=1"]) == 0
    assert renamed == [row["output"] for row in rows(tmp_path / "out")]


def test_what_another_run_makes_during_the_planning_is_no_file_of_others(run, tmp_path, monkeypatch, capsys):
    tiles = make_tiles(tmp_path / "in", 3)
    place = plan.place

    def place_while_another_run_works(*arguments):
        with monkeypatch.context() as other:
            other.setattr(plan, "place", place)
            assert run(tmp_path / "in") == 0
        return place(*arguments)

    monkeypatch.setattr(plan, "place", place_while_another_run_works)
    assert run(tmp_path / "in") == 0
    assert "3 of them by an earlier run" in capsys.readouterr().out.splitlines()[-1]
    assert len(rows(tmp_path / "out")) == len(tiles)


def test_an_overview_shows_images_of_earlier_runs(run, tmp_path):
    make_tiles(tmp_path / "in", 3)
    assert run(tmp_path / "in") == 0
    assert run(tmp_path / "in", options=["--overview"]) == 0
    with Image.open(tmp_path / "out/overview.png") as sheet:
        assert sheet.size == (3 * (2 * 256 + 3 * 8), 256 + 18 + 8)


def test_what_is_no_regular_file_is_refused_at_once(run, tmp_path, capsys):
    folder = tmp_path / "in"
    save(folder / "a.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "nowhere.png").symlink_to(folder / "none.png")
    (folder / "null.png").symlink_to("/dev/zero")
    (folder / "up").symlink_to(folder)
    assert run(folder) == 1
    captured = capsys.readouterr()
    assert "1 of 5 images" in captured.out
    for name, message in {
        "pipe": "expected a regular file",
        "null": "expected a regular file",
        "loop": "Too many levels of symbolic links",
        "nowhere": "No such file",
    }.items():
        assert message in next(line for line in captured.err.splitlines() if f"/{name}.png" in line)
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert run(folder, out="x", options=["--weights", f"{tmp_path}/pipe.safetensors"]) == 2
    assert "expected a regular file" in capsys.readouterr().err


def test_originals_in_the_output_folder_are_not_replaced(run, tmp_path, capsys):
    save(tmp_path / "in/a.png")
    original = save(tmp_path / "in/s/a.png", to_pil_image(render_tile(1, 20)))
    before = original.read_bytes()
    assert run(tmp_path / "in", out="in/s") == 2
    assert "in/s/a.png, which is there and was not made by this command" in capsys.readouterr().err
    assert original.read_bytes() == before
    assert [path.name for path in original.parent.iterdir()] == ["a.png"]


def test_the_input_by_another_path_is_not_replaced(run, tmp_path, capsys):
    path = save(tmp_path / "in/a.png")
    before = path.read_bytes()
    (tmp_path / "mounted").mkdir()
    if subprocess.run(
        ["mount", "--bind", tmp_path / "in", tmp_path / "mounted"], capture_output=True, check=False
    ).returncode:
        pytest.skip("run as root: a folder is mounted")
    try:
        assert run(path, out="mounted") == 2
        assert "is an input and would be overwritten" in capsys.readouterr().err
        assert run(tmp_path / "in", out="mounted") == 2
    finally:
        subprocess.run(["umount", "-l", tmp_path / "mounted"], check=True)
    assert path.read_bytes() == before


def test_a_path_through_a_link_is_followed_as_the_system_does(run, tmp_path, random_normalize, monkeypatch):
    save(tmp_path / "in/a.png")
    save(tmp_path / "other/in/a.png", to_pil_image(render_tile(3)))
    (tmp_path / "other/folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other/folder")
    monkeypatch.chdir(tmp_path)
    assert run("link/../in") == 0
    assert torch.equal(read(tmp_path / "out/a.png"), random_normalize(render_tile(3)))


def test_an_empty_name_is_no_folder(trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["normalize", str(save(tmp_path / "a.png")), "--out", "", "--weights", str(trained)])
    assert "expected a file or folder, got an empty name" in capsys.readouterr().err


def test_results_have_the_permissions_of_new_files(start, tmp_path):
    tile = save(tmp_path / "in/a.png")
    before = os.umask(0o027)
    try:
        assert start(tile)().status == 0
    finally:
        os.umask(before)
    assert (tmp_path / "out/a.png").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EROFS"])
def test_what_every_image_would_meet_stops_the_run(run, tmp_path, monkeypatch, capsys, number):
    make_tiles(tmp_path / "in", 3)

    reason = os.strerror(getattr(errno, number))

    def fail(*_, **__):
        raise OSError(getattr(errno, number), reason, "x.png")

    monkeypatch.setattr(images, "encode", fail)
    for options, told in (((), True), (("--again", "--overview"), False)):
        assert run(tmp_path / "in", options=options) == 2
        captured = capsys.readouterr()
        assert "0 of 3 images" in captured.out
        assert captured.err.count(reason) == 1
        assert "stopped; what was finished is kept" in captured.err
        assert ("goes on from here" in captured.err) == told


def test_names_do_not_control_the_terminal(run, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/\x1b[2Jü.png").write_bytes(b"")
    (tmp_path / "in/b\n0 failed.png").write_bytes(b"")
    assert run(tmp_path / "in", out="\x1b]0;x\x07") == 1
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "\\x1b[2Jü.png: cannot identify" in captured.err
    assert "b\\n0 failed.png: cannot identify" in captured.err
    with pytest.raises(SystemExit):
        main(["normalize", "--\x1b[2J.png", "--out", "x"])
    save(tmp_path / "in/a.png")
    assert main(["train", str(tmp_path / "in"), "--out", str(tmp_path / "w.safetensors"), "--iterations", "1"]) == 0
    captured = capsys.readouterr()
    assert "\x1b[2J" not in captured.out + captured.err
    assert "\\x1b[2J" in captured.out + captured.err


def test_names_beyond_the_encoding_of_the_terminal(start, tmp_path):
    path = save(tmp_path / "ü/a.png")
    done = start(path, out=os.fsencode(tmp_path) + b"/\xff\xc3\xbc", encoding="ascii")()
    assert (done.status, done.err) == (0, "")
    assert "1 of 1 images normalized to 'test'" in done.out


def test_an_overview_of_nothing_is_none(run, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"x")
    assert run(tmp_path / "in", options=["--overview"]) == 1
    assert "0 of 1 images" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["offsets.csv"]
