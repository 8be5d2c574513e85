"""Whole files or none."""

import fcntl

from stainnorm_transform import files


def test_leftovers_of_killed_runs_go_and_files_in_use_stay(tmp_path):
    left, used = (tmp_path / f"{files.PREFIX}{name}{files.SUFFIX}" for name in ("left", "used"))
    for path in (left, used):
        path.write_bytes(b"x")
    with used.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with files.replacing(tmp_path / "a.png") as temporary:
            temporary.write_bytes(b"y")
            files.remove_leftovers.cache_clear()
            with files.replacing(tmp_path / "b.png") as other:
                other.write_bytes(b"z")
    assert {path.name for path in tmp_path.iterdir()} == {used.name, "a.png", "b.png"}
