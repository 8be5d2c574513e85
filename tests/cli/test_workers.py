import errno
import threading

import pytest
from render_tiles import render_tile
from synthetic import rows, save
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform.folders import images
from stainnorm_transform.folders.normalizer import FileNormalizer


def test_the_number_of_workers_changes_nothing(run, tmp_path):
    for number in range(7):
        save(tmp_path / "in" / f"{number}.png", to_pil_image(render_tile(number)))
    (tmp_path / "in" / "damaged.png").write_bytes(b"no image")
    found = {}
    for workers in (1, 3):
        out = f"out{workers}"
        assert run(tmp_path / "in", out=out, options=[f"--workers={workers}"]) == 1
        table = {row["output"]: [row["offset_a"], row["map_b"], row["output_bytes"]] for row in rows(tmp_path / out)}
        pixels = {path.name: path.read_bytes() for path in (tmp_path / out).glob("*.png")}
        assert table.keys() == pixels.keys() == {f"{number}.png" for number in range(7)}
        found[workers] = table, pixels
    assert found[1] == found[3]


def test_as_many_images_at_a_time_as_workers(run, tmp_path, monkeypatch):
    for number in range(6):
        save(tmp_path / "in" / f"{number}.png")
    normalize = FileNormalizer.normalize
    together = threading.Barrier(3, timeout=60)

    def wait_for_two_more(self, path, output, progress=None):
        together.wait()
        return normalize(self, path, output)

    monkeypatch.setattr(FileNormalizer, "normalize", wait_for_two_more)
    assert run(tmp_path / "in", options=["--workers=3"]) == 0
    assert len(rows(tmp_path / "out")) == 6


def test_a_full_disk_stops_all_workers_and_keeps_what_is_finished(run, tmp_path, monkeypatch, capsys):
    for number in range(20):
        save(tmp_path / "in" / f"{number:02}.png")
    encode = images.encode
    room = threading.Semaphore(5)

    def until_full(image, suffix, like=None):
        if not room.acquire(blocking=False):
            raise OSError(errno.ENOSPC, "No space left on device")
        return encode(image, suffix, like)

    monkeypatch.setattr(images, "encode", until_full)
    assert run(tmp_path / "in", options=["--workers=4"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    out = tmp_path / "out"
    assert {row["output"] for row in rows(out)} == {path.name for path in out.glob("*.png")}
    assert len(rows(out)) == 5
    assert not list(out.glob(".stainnorm-*"))
    monkeypatch.undo()
    assert run(tmp_path / "in", options=["--workers=4"]) == 0
    assert len({row["output"] for row in rows(out)}) == 20


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_counts_that_are_none_are_refused(run, tmp_path, capsys, count):
    save(tmp_path / "in" / "a.png")
    with pytest.raises(SystemExit):
        run(tmp_path / "in", options=[f"--workers={count}"])
    assert f"expected a number of 1 or more, got '{count}'" in capsys.readouterr().err
