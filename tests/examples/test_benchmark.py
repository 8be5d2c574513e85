import argparse
import json

import benchmark
import pytest
import torch

from stainnorm_transform.color import look_up, shift_ab, shift_table


@pytest.fixture
def benchmarked(monkeypatch, tmp_path, capsys):
    """Runs the benchmark without a process for every row, and returns what it writes."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(benchmark, "peak_memory", lambda case, options: 1.0)
    monkeypatch.setattr(benchmark, "available", lambda method: method in ("NormalizeStain", "shift", "kornia"))
    monkeypatch.setenv("STAINNORM_DATA", str(tmp_path))

    def run(*arguments):
        command = ["benchmark.py", "--rounds", "2", "--threads", "1", "--json", str(tmp_path / "out.json"), *arguments]
        monkeypatch.setattr("sys.argv", command)
        benchmark.main()
        return json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)


def test_every_figure_is_written_and_printed(benchmarked):
    written, printed = benchmarked("--only", "256 x 256")
    tables = {row["table"] for row in written["rows"]}
    assert "Whole normalizer, one uint8 tile of 256 x 256" in tables
    assert "Shift by a given offset, float32, 32 x 3 x 256 x 256" in tables
    assert {row["method"] for row in written["rows"]} >= {"NormalizeStain", "shift", "kornia"}
    for row in written["rows"]:
        low, high = row["ms_quartiles"]
        assert 0 < low <= row["ms"] <= high
        assert row["seconds_per_gigapixel"] == pytest.approx(row["ms"] / 1e3 / 256**2 * 1e9)
        assert f"| {row['method']} | {row['ms']:.3g} (" in printed
    assert "1 thread(s)" in written["machine"]
    assert written["machine"] in printed


def test_what_is_compared_does_the_same(tmp_path):
    case = benchmark.Case("", "", 2, 64, "float32")
    image = benchmark.picture(case, tmp_path)
    assert image.shape == (2, 3, 64, 64)
    assert image.max() <= 1
    reference = benchmark.kornia_shift(image, benchmark.OFFSET)
    torch.testing.assert_close(shift_ab(image, benchmark.OFFSET, preserve_white=False), reference, atol=1e-4, rtol=0)
    levels = (image * 255).to(torch.uint8)
    difference = look_up(levels, shift_table(benchmark.OFFSET, False)).int()
    difference -= benchmark.kornia_shift(levels, benchmark.OFFSET).int()
    assert difference.abs().max() <= 1
    by_map = benchmark.shift_by_map(case, levels)()
    assert (benchmark.table(case, levels)().int() - by_map.int()).abs().max() <= 1
    # The map differs from the offset, and for a usual color of tissue is that.
    assert torch.equal(benchmark.MAP[:, 0], benchmark.OFFSET)
    assert (by_map.int() - benchmark.shift(case, levels)().int()).abs().max() > 5


def test_memory_is_that_of_the_result_for_a_copy(tmp_path):
    case, options = benchmark.Case("", "copy", 1, 2048), argparse.Namespace(threads=1, data=tmp_path)
    assert benchmark.peak_memory(case, options) == pytest.approx(3 * 2048**2 / 1e6, rel=0.2)


def slow_if_compiled(method):
    return pytest.param(method, marks=pytest.mark.slow) if "compiled" in method else method


@pytest.mark.parametrize("method", [slow_if_compiled(name) for name in benchmark.METHODS if benchmark.available(name)])
def test_every_method_runs(method, tmp_path):
    with torch.no_grad():
        assert benchmark.Case("", method, 1, 64).call(tmp_path)() is not None
