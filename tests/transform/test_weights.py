import dataclasses
import hashlib
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from camelyon17 import read, read_center
from train_camelyon17 import RECIPES

from stainnorm_transform import ColorNormNet, NormalizeStain, TrainConfig, weights

ERRORS = ("held_out_error", "held_out_error_std_over_images", "held_out_error_same_for_all_shifts")
GOLDEN = Path(__file__).parent / "golden"


def test_the_default_is_shipped():
    assert weights.names() == [*weights.ALIASES, *weights.SHA256]
    assert NormalizeStain.pretrained().target == weights.ALIASES[weights.DEFAULT]
    default, other = weights.load(), weights.load(weights.ALIASES[weights.DEFAULT])
    assert (default.target, default.metrics) == (other.target, other.metrics)


def test_every_target_is_shipped():
    centers = {f"camelyon17-center{center}" for center in range(5)}
    assert set(weights.SHA256) == {*centers, "camelyon17-paper"}
    files = {path.stem for path in weights.FOLDER.glob("*.safetensors")}
    assert files == set(weights.SHA256)


@pytest.mark.parametrize("name", weights.SHA256)
def test_shipped_weights_are_what_they_say(name):
    path = weights.FOLDER / f"{name}.safetensors"
    content = path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == weights.SHA256[name]
    assert len(content) <= 50_000
    loaded = weights.load(name)
    assert sum(parameter.numel() for parameter in loaded.network.parameters()) == 2352
    assert loaded.target == name
    config = TrainConfig(**{**loaded.config, "scales": tuple(loaded.config["scales"])})
    recipe = RECIPES[name]
    assert config == recipe.config
    assert loaded.data["summary"].startswith(f"CAMELYON17 center {recipe.center}, 6 images")
    error = loaded.metrics["held_out_error"]
    by_image = loaded.metrics["held_out_error_by_image"]
    assert set(by_image) == set(loaded.data["images"])
    assert np.mean(list(by_image.values()), axis=0).tolist() == pytest.approx([error["a"], error["b"]], abs=0.01)
    assert loaded.date >= "2026"


@pytest.mark.parametrize("name", weights.SHA256)
def test_the_model_card_says_what_the_metadata_says(name):
    card = (weights.FOLDER / "README.md").read_text()
    metrics = weights.load(name).metrics
    cells = [f"{metrics[key][channel]:.2f}" for key in ERRORS for channel in "ab"]
    row = next(line for line in card.splitlines() if line.startswith(f"| `{name}`"))
    assert re.findall(r"\d+\.\d\d", row) == cells
    for image, error in metrics["held_out_error_by_image"].items():
        assert re.search(rf"\| {Path(image).stem} \|.*\b{error[0]:.2f}, {error[1]:.2f}\b", card)


@pytest.mark.parametrize("name", weights.SHA256)
def test_images_of_the_target_keep_their_color(data, name):
    normalize = NormalizeStain.pretrained(name)
    images = read_center(data, RECIPES[name].center).values()
    offsets = torch.stack([normalize.estimate_offset(image) for image in images])
    assert offsets.mean(dim=0).norm() < 2


@pytest.mark.parametrize("name", weights.SHA256)
def test_golden_output(name):
    normalize = NormalizeStain.pretrained(name)
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    image = read(GOLDEN / "input.png")  # render_tile(42, 96)
    assert normalize.estimate_offset(image).tolist() == pytest.approx(expected["offset"], abs=0.02)
    np.testing.assert_allclose(normalize.estimate_map(image), expected["map"], atol=0.05)
    difference = normalize(image).int() - read(GOLDEN / f"{name}.png").int()
    assert difference.abs().max() <= 1


def test_round_trip(tmp_path):
    network = ColorNormNet()
    config = TrainConfig(iterations=7, preserve_white=False)
    path = tmp_path / "mylab.safetensors"
    weights.save(network, path, config, data={"images": ["a"]}, metrics={"error": 1.5})
    loaded = weights.load(path)
    assert (loaded.target, loaded.data, loaded.metrics) == ("mylab", {"images": ["a"]}, {"error": 1.5})
    assert (loaded.config["iterations"], loaded.config["preserve_white"]) == (7, False)
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in loaded.network.state_dict().items())
    assert not loaded.network.training
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    normalize = NormalizeStain.pretrained(path)
    assert normalize.preserve_white is False
    assert normalize.slopes is True
    assert "iterations=7" in repr(normalize)
    assert list(tmp_path.iterdir()) == [path]


def test_networks_trained_for_offsets_alone_estimate_offsets_alone(tmp_path):
    network, path = ColorNormNet(), tmp_path / "mylab.safetensors"
    for slope in (0, 0.0, 0.3):
        weights.save(network, path, TrainConfig(slope=slope))
        normalize = NormalizeStain.pretrained(path)
        assert normalize.slopes is (slope > 0)
        assert f"slope={slope}" in repr(normalize)
        assert bool(normalize.estimate_map(read(GOLDEN / "input.png"))[:, 1:].any()) is (slope > 0)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"shipped weights \(.*camelyon17.*got 'camelyon16'"):
        weights.load("camelyon16")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        weights.load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError):
        weights.load("none.safetensors")


def damage(kind: str, good: bytes) -> bytes:
    tensors = safetensors.torch.load(good)
    metadata = {"stainnorm_transform": json.dumps({"format": weights.FORMAT, "target": "t", "config": {}})}
    if kind == "missing tensor":
        del tensors["stem.weight"]
    if kind == "extra tensor":
        tensors["extra"] = torch.zeros(1)
    if kind == "wrong shape":
        tensors["stem.weight"] = torch.zeros(3, 3, 5, 5)
    if kind == "nan":
        tensors["stem.weight"][0] = torch.nan
    if kind == "no metadata":
        metadata = {"other": "x"}
    if kind == "bad json":
        metadata = {"stainnorm_transform": "{"}
    if kind == "unknown fields":
        metadata = {"stainnorm_transform": json.dumps({"format": weights.FORMAT, "surprise": 1})}
    if kind == "no recipe":
        metadata = {"stainnorm_transform": json.dumps({"format": weights.FORMAT, "target": "t", "config": [1]})}
    if kind == "no dictionary":
        metadata = {"stainnorm_transform": "[]"}
    if kind == "older format":
        metadata = {"stainnorm_transform": json.dumps({"target": "t", "config": {}})}
    if kind == "format 2":
        config = {**dataclasses.asdict(TrainConfig()), "contrast_jitter": 0.5}
        del config["slope"]
        metadata = {"stainnorm_transform": json.dumps({"format": 2, "target": "t", "config": config})}
    if kind in ("no slope", "slope"):
        config = {"preserve_white": True, **({"slope": "0.3"} if kind == "slope" else {})}
        metadata = {"stainnorm_transform": json.dumps({"format": weights.FORMAT, "target": "t", "config": config})}
    return safetensors.torch.save(tensors, metadata)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing tensor", r"Missing key\(s\).*stem\.weight"),
        ("extra tensor", "Unexpected key"),
        ("wrong shape", "size mismatch for stem.weight"),
        ("nan", "finite weights"),
        ("no metadata", "ColorNormNet"),
        ("bad json", "ColorNormNet"),
        ("unknown fields", "ColorNormNet"),
        ("no recipe", "ColorNormNet"),
        ("no dictionary", "ColorNormNet"),
        ("no slope", "expected the weights of a ColorNormNet, got .*'slope'"),
        ("slope", "config.slope is not a number"),
        ("older format", r"has format 0, this version of the package reads 3: train it again"),
        ("format 2", r"has format 2, this version of the package reads 3: train it again"),
    ],
)
def test_damaged_files(tmp_path, kind, message):
    good = tmp_path / "good.safetensors"
    weights.save(ColorNormNet(), good, TrainConfig())
    path = tmp_path / "bad.safetensors"
    path.write_bytes(damage(kind, good.read_bytes()))
    with pytest.raises(ValueError, match=r"(?s)bad\.safetensors") as error:
        NormalizeStain.pretrained(path)
    assert error.match("(?s)" + message)


class _Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 7, b"\xff" * 64, b"\x10\x00\x00\x00\x00\x00\x00\x00{}", pickle.dumps(_Trap())],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a safetensors file, got .*bad\.safetensors"):
        weights.load(path)


def test_truncated_and_huge_files_are_refused(tmp_path):
    path = tmp_path / "bad.safetensors"
    weights.save(ColorNormNet(), path, TrainConfig())
    content = path.read_bytes()
    for length in (10, 1000, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="expected a safetensors file"):
            weights.load(path)
    with path.open("wb") as file:
        file.truncate(10**10)
    with pytest.raises(ValueError, match="at most 1000000 bytes, got 10000000000"):
        weights.load(path)


def test_damaged_shipped_weights_are_noticed(monkeypatch):
    monkeypatch.setitem(weights.SHA256, weights.ALIASES[weights.DEFAULT], "0" * 64)
    with pytest.raises(ValueError, match="damaged: its sha256"):
        NormalizeStain.pretrained()


def test_save_wants_the_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"ending in \.safetensors, got .*mylab\.pt"):
        weights.save(ColorNormNet(), tmp_path / "mylab.pt", TrainConfig())


def test_save_wants_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder of .*none/mylab\.safetensors does not exist"):
        weights.save(ColorNormNet(), tmp_path / "none/mylab.safetensors", TrainConfig())


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "mylab.safetensors"
    weights.save(ColorNormNet(), path, TrainConfig())
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        weights.save(ColorNormNet(), path, TrainConfig())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
