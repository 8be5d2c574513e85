import dataclasses
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from apart import Stop, in_a_terminal, run_apart
from render_tiles import render_tile
from synthetic import make_slide, tissue
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform import NormalizeStain, TrainConfig, weights
from stainnorm_transform.cli.main import _parser, main
from stainnorm_transform.cli.train import _hold_out
from stainnorm_transform.color import shift_ab

FAST = ["--iterations", "4", "--batch-size", "4", "--report-every", "2", "--device", "cpu"]


# At the end of an iteration, after its checkpoint.
REPORT = "training.loop.Report"


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(image).save(path)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiles")
    for seed in range(6):
        save(render_tile(seed, 64 + 8 * seed), folder / f"slide_{seed % 2}" / f"{seed}.png")
    return folder


def tensors_and_metadata(path):
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()[weights.METADATA_KEY])
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def assert_same_weights(first, second):
    """Equal but for what says when they were made and by which name."""
    (tensors, metadata), (other_tensors, other_metadata) = map(tensors_and_metadata, (first, second))
    assert tensors.keys() == other_tensors.keys()
    assert all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)
    for each in (metadata, other_metadata):
        del each["date"], each["target"]
    assert metadata == other_metadata


def test_from_tiles_to_normalized_images(tiles, tmp_path, capsys):
    out = tmp_path / "lab.safetensors"
    assert main(["train", str(tiles), "--out", str(out), *FAST, "--seed", "5"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["lab.safetensors"]
    printed = capsys.readouterr().out
    assert "images to train on: 5; held out: 1; device: cpu" in printed
    assert "iteration 4: loss" in printed
    assert f"weights: {out}" in printed
    for label in ("lab", "shipped camelyon17", "the same, its mean removed"):
        assert re.search(rf"^  {label} +\d+\.\d\d +\d+\.\d\d$", printed, re.MULTILINE)

    loaded = weights.load(out)
    assert (loaded.target, loaded.config["seed"]) == ("lab", 5)
    assert loaded.data == {"summary": "5 images", "images": 5, "held_out": 1}
    error = loaded.metrics["held_out_error"]
    assert f"a* {error['a']:.2f}, b* {error['b']:.2f}" in loaded.metrics["summary"]
    assert re.search(rf"^  lab +{error['a']:.2f} +{error['b']:.2f}$", printed, re.MULTILINE)
    assert NormalizeStain.pretrained(out).target == "lab"
    assert main(["normalize", str(tiles), "--weights", str(out), "--out", str(tmp_path / "after")]) == 0
    assert len(list((tmp_path / "after").rglob("*.png"))) == 6


def test_the_same_seed_gives_the_same_file_whatever_the_workers(tiles, tmp_path):
    for name, workers in (("one", "0"), ("two", "2")):
        folder = tmp_path / name
        folder.mkdir()
        assert main(["train", str(tiles), "--out", str(folder / "lab.safetensors"), *FAST, "--workers", workers]) == 0
    first, second = ((tmp_path / name / "lab.safetensors") for name in ("one", "two"))
    assert_same_weights(first, second)
    date = weights.load(first).date
    if weights.load(second).date == date:
        assert first.read_bytes() == second.read_bytes()


def test_killed_and_resumed_ends_as_if_it_had_not_been(tiles, tmp_path):
    """To the bit: the same operations in the same order, on the same machine and one thread."""
    settings = ["--iterations", "12", "--batch-size", "4", "--report-every", "2", "--device", "cpu"]
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    command = ["train", tiles, "--out", killed, *settings]
    # At the end of a measured iteration, with a checkpoint that has no name yet, and just started again.
    for stop in (Stop(REPORT, 4), Stop("files.Path.replace", 4), Stop(REPORT, 1)):
        assert run_apart(command, stop=stop).status == -signal.SIGKILL
        assert [path.name for path in tmp_path.glob("*.safetensors")] == ["killed.checkpoint.safetensors"]
        command = ["train", tiles, "--out", killed, *settings, "--resume"]
    assert run_apart(command).status == 0
    assert run_apart(["train", tiles, "--out", whole, *settings]).status == 0
    assert_same_weights(whole, killed)
    assert {path.name for path in tmp_path.iterdir()} == {whole.name, killed.name}


def test_resume_without_a_checkpoint_starts_and_after_the_end_does_nothing(tiles, tmp_path, capsys):
    arguments = ["train", str(tiles), "--out", str(tmp_path / "lab.safetensors"), *FAST, "--resume"]
    assert main(arguments) == 0
    content = (tmp_path / "lab.safetensors").read_bytes()
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith("no checkpoint beside it: nothing to resume\n")
    assert (tmp_path / "lab.safetensors").read_bytes() == content


def test_interrupted_by_the_user_and_resumed(tiles, tmp_path, capsys):
    out = tmp_path / "lab.safetensors"
    command = ["train", str(tiles), "--out", str(out), *FAST[2:], "--iterations", "8"]
    interrupted = run_apart(command, stop=Stop(REPORT, 4, signal.SIGINT))
    assert interrupted.status == 130
    assert "interrupted; add --resume to go on from" in interrupted.err
    assert "Traceback" not in interrupted.err
    assert main([*command, "--resume", "--seed", "1"]) == 2
    message = "the run had other settings (seed 0, now 1): give the same, or remove the checkpoint"
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["lab.checkpoint.safetensors"]


def test_resumed_with_other_images(tiles, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "tiles"
    for seed in range(4):
        save(render_tile(seed, 64), folder / f"{seed}.png")
    arguments = ["train", str(folder), "--out", str(tmp_path / "lab.safetensors"), *FAST]

    def stop(report):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("stainnorm_transform.cli.train.print_measured", stop)
        assert main(arguments) == 130
    save(render_tile(9, 64), folder / "1.png")
    assert main([*arguments, "--resume"]) == 2
    assert "the run had other images" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [60])
def test_progress_in_a_terminal(tiles, tmp_path, columns):
    """The bar shows loss, error and time left, and fits."""
    arguments = ["train", tiles, "--out", tmp_path / "lab.safetensors", *FAST, "--iterations", "40"]
    lines = in_a_terminal(arguments, columns)
    assert max(map(len, lines)) <= columns
    bars = [line for line in lines if re.search(r"\d+:\d\d left, loss \d+\.\d, error a\* \d+\.\d b\* \d+\.\d", line)]
    assert bars[-1].startswith("40/40 |")


def test_every_setting_can_be_given():
    given = {
        "iterations": 7,
        "batch_size": 3,
        "crop": 40,
        "scales": [2.0, 3.0],
        "max_offset": 12.5,
        "slope": 0.125,
        "contrast_jitter": 0.75,
        "darkness_jitter": 0.1,
        "preserve_white": False,
        "learning_rate": 0.5,
        "l2_weight": 0.25,
        "min_tissue": 0.75,
        "report_every": 9,
        "seed": 11,
    }
    assert set(given) == {field.name for field in dataclasses.fields(TrainConfig)}
    arguments = ["train", "tiles", "--out", "lab.safetensors"]
    for name, value in given.items():
        option = name.replace("_", "-")
        arguments += ["--no-" + option] if value is False else ["--" + option, *str(value).strip("[]").split(", ")]
    options = _parser(arguments).parse_args(arguments)
    assert {name: getattr(options, name) for name in given} == given


def test_images_that_cannot_be_used_are_named_and_left_out(tiles, tmp_path, capsys):
    folder = tmp_path / "tiles"
    for seed in range(3):
        save(render_tile(seed, 64), folder / f"good_{seed}.png")
    save(render_tile(0, 20), folder / "small.png")
    save(torch.full((3, 64, 64), 255, dtype=torch.uint8), folder / "white.png")
    save(torch.full((3, 64, 64), 90, dtype=torch.uint8), folder / "one_color.png")
    save(torch.randint(200, 256, (1, 64, 64)).to(torch.uint8).expand(3, 64, 64), folder / "noise.png")
    (folder / "text.png").write_text("not an image")
    whole = (folder / "good_0.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    to_pil_image(render_tile(0, 64)).convert("L").save(folder / "grey.png")
    assert main(["train", str(folder), "--out", str(tmp_path / "lab.safetensors"), *FAST]) == 0
    captured = capsys.readouterr()
    assert "images to train on: 2; held out: 1" in captured.out
    lines = captured.err.splitlines()
    assert "7 of 10 files cannot be used and are left out:" in lines
    for name, reason in {
        "small.png": "20 x 20 pixels, smaller than a crop of 32 x 32",
        "white.png": "few flat colors: a label mask, or blank",
        "one_color.png": "few flat colors",
        "noise.png": "no tissue",
        "text.png": "cannot identify image file",
        "half.png": "truncated",
        "grey.png": "a grey image",
    }.items():
        assert any(f"{folder / name}: " in line and reason in line for line in lines), name


def test_held_out_images_are_not_trained_on(tiles, tmp_path, capsys):
    held_out = tiles / "slide_1"
    out = tmp_path / "lab.safetensors"
    assert main(["train", str(tiles), "--held-out", str(held_out), "--out", str(out), *FAST]) == 0
    assert "images to train on: 3; held out: 3" in capsys.readouterr().out
    alone = tmp_path / "alone.safetensors"
    assert main(["train", str(tiles / "slide_0"), "--held-out", str(held_out), "--out", str(alone), *FAST]) == 0
    assert_same_weights(out, alone)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Six slides of 9 tiles each."""
    folder = tmp_path_factory.mktemp("slides")
    for number in range(6):
        pixels = np.roll(tissue(768, 768), 100 * number, axis=1)
        make_slide(folder / f"{number}.svs", pixels, mpp=0.5)
    return folder


def test_slides_are_trained_on_by_their_tiles(slides, tiles, tmp_path, capsys):
    make_slide(tmp_path / "bad/blank.svs", np.full((600, 600, 3), 240, np.uint8))
    (tmp_path / "bad/none.ndpi").write_text("no slide")
    arguments = [str(slides), str(tiles / "slide_0"), str(tmp_path / "bad"), "--out", str(tmp_path / "lab.safetensors")]
    assert main(["train", *arguments, *FAST]) == 0
    printed = capsys.readouterr()
    # Of nine files one is held out, a slide as a whole.
    assert "images to train on: 48, of 5 slides; held out: 9, of 1 slide; device: cpu" in printed.out
    assert "2 of 11 files cannot be used and are left out:\n" in printed.err
    assert f"{tmp_path}/bad/blank.svs: no tile of which a quarter is tissue\n" in printed.err
    assert f"{tmp_path}/bad/none.ndpi: not a slide of a format" in printed.err
    data = weights.load(tmp_path / "lab.safetensors").data
    summary = "48 images, tiles of 5 slides among them"
    assert data == {"summary": summary, "images": 48, "held_out": 9, "slides": 5}


def test_slides_are_held_out_as_a_whole(slides, tmp_path, monkeypatch):
    seen = []

    def stop(training, config, held_out, **options):
        seen.extend({part.dataset.sources[index][0].name for index in part.indices} for part in (training, held_out))
        raise KeyboardInterrupt

    monkeypatch.setattr("stainnorm_transform.cli.train.train", stop)
    arguments = ["train", str(slides), "--out", str(tmp_path / "lab.safetensors"), *FAST]
    assert main(arguments) == 130
    assert main([*arguments, "--held-out", str(slides / "1.svs"), str(slides / "4.svs")]) == 130
    every = {f"{number}.svs" for number in range(6)}
    assert seen[1] == {"3.svs"}
    assert seen[0] == every - seen[1]
    assert seen[3] == {"1.svs", "4.svs"}
    assert seen[2] == every - seen[3]


def test_about_fifty_images_are_held_out_at_most():
    for files, tiles, expected in ((1, 16, 0), (2, 16, 1), (12, 16, 2), (40, 16, 3), (40, 1, 8), (1000, 1, 50)):
        usable = {Path(f"{number}"): [0] * tiles for number in range(files)}
        assert len(set(_hold_out(usable))) == expected


def test_one_image_is_trained_on_without_measuring(tmp_path, capsys):
    save(shift_ab(render_tile(0, 128), torch.tensor([5.0, 5.0])), tmp_path / "field.png")
    out = tmp_path / "lab.safetensors"
    assert main(["train", str(tmp_path / "field.png"), "--out", str(out), *FAST]) == 0
    assert "error was not measured" in capsys.readouterr().out
    assert "held_out_error" not in weights.load(out).metrics


@pytest.mark.parametrize(
    "arguments", [["", "--out", "a"], ["tiles", "--out", ""], ["a", "--out", "b", "--held-out", ""]]
)
def test_a_variable_that_is_not_set_is_no_folder(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["train", *arguments])
    assert "expected a file or folder, got an empty name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "--out", "lab.safetensors"], "missing does not exist"),
        (["empty", "--out", "lab.safetensors"], "no images"),
        (["white", "--out", "lab.safetensors"], "no image is left to train on"),
        (["tiles", "--held-out", "white", "--out", "lab.safetensors"], "no held-out image is left"),
        (["tiles", "--held-out", "tiles", "--out", "lab.safetensors"], "no image is left to train on"),
        (["tiles", "--out", "lab.pt"], "a path ending in .safetensors, got lab.pt"),
        (["tiles", "--out", "missing/lab.safetensors"], "the folder of missing/lab.safetensors does not exist"),
        (["tiles", "--out", "there.safetensors"], "there.safetensors exists: choose another name"),
        (["tiles", "--out", "half.safetensors"], "is of an interrupted run: add --resume"),
        (["tiles", "--out", "half.safetensors", "--resume"], "cannot go on from .*: expected the checkpoint"),
        (["tiles", "--out", "lab.safetensors", "--crop", "0"], "crop >= 1, got 0"),
        (["tiles", "--out", "lab.safetensors", "--crop", "500"], "no image is left to train on"),
        (["tiles", "--out", "lab.safetensors", "--device", "tpu"], "a device that is here"),
        (["tiles", "--out", "lab.safetensors", "--workers", "-1"], "workers >= 0, got -1"),
        (
            ["tiles", "--out", "lab.safetensors", "--learning-rate", "1e30"],
            "the loss is .* start again with a lower learning rate",
        ),
    ],
)
def test_bad_input_loses_nothing(tiles, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("tiles").symlink_to(tiles)
    Path("empty").mkdir()
    save(torch.full((3, 64, 64), 255, dtype=torch.uint8), Path("white/white.png"))
    for name in ("there.safetensors", "half.checkpoint.safetensors"):
        Path(name).write_text("precious")
    assert main(["train", *arguments, *(["--iterations", "50", "--batch-size", "2"])]) == 2
    error = capsys.readouterr().err
    assert [bool(re.search(message, line)) for line in error.splitlines() if line.startswith("stainnorm: ")] == [True]
    assert Path("there.safetensors").read_text() == Path("half.checkpoint.safetensors").read_text() == "precious"
    assert not Path("lab.safetensors").exists()


def test_a_full_disk_is_found_before_training(tiles, tmp_path):
    result = run_apart(["train", tiles, "--out", tmp_path / "lab.safetensors", *FAST], largest_file=10_000)
    assert result.status == 2
    assert re.search("^stainnorm: .*File too large", result.err, re.MULTILINE)
    assert "iteration" not in result.out
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_loses_only_what_came_after_the_checkpoint(tiles, tmp_path):
    out, checkpoint = tmp_path / "lab.safetensors", tmp_path / "lab.checkpoint.safetensors"
    command = ["train", tiles, "--out", out, *FAST]
    killed = run_apart(command, stop=Stop(REPORT, 3))
    assert killed.status == -signal.SIGKILL, killed
    before = checkpoint.read_bytes()
    result = run_apart([*command, "--resume"], largest_file=10_000)
    assert result.status == 2
    assert "iteration" not in result.out
    assert checkpoint.read_bytes() == before
    assert run_apart([*command, "--resume"]).status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["lab.safetensors"]


def test_help_fits_a_terminal_and_names_every_setting(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for field in dataclasses.fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in printed
