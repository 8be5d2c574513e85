import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from camelyon17 import read

from stainnorm_transform import ColorNormNet, NormalizeStain, TrainConfig, weights

GOLDEN = Path(__file__).parent / "golden"


def test_the_default_is_shipped():
    assert weights.DEFAULT in weights.names()
    assert NormalizeStain.pretrained().target == weights.DEFAULT


@pytest.mark.parametrize("name", weights.names())
def test_shipped_weights_are_what_they_say(name):
    path = Path(weights.__file__).with_name(f"{name}.safetensors")
    content = path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == weights.SHA256[name]
    assert len(content) <= 50_000
    loaded = weights.load(name)
    assert sum(parameter.numel() for parameter in loaded.network.parameters()) == 2352
    assert loaded.target == name
    TrainConfig(**{**loaded.config, "scales": tuple(loaded.config["scales"])})
    error = loaded.metrics["held_out_error"]
    assert 0 < (error["a"] + error["b"]) / 2 <= 2.0
    by_image = loaded.metrics["held_out_error_by_image"]
    assert set(by_image) == set(loaded.data["images"])
    assert np.mean(list(by_image.values()), axis=0).tolist() == pytest.approx([error["a"], error["b"]], abs=0.01)
    assert loaded.date >= "2026"


@pytest.mark.parametrize("name", weights.names())
def test_golden_output(name):
    normalize = NormalizeStain.pretrained(name)
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    image = read(GOLDEN / "input.png")
    assert normalize.estimate_offset(image).tolist() == pytest.approx(expected["offset"], abs=0.02)
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
    assert "iterations=7" in repr(normalize)
    assert list(tmp_path.iterdir()) == [path]


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
    metadata = {"stainnorm_transform": json.dumps({"target": "t", "config": {}})}
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
        metadata = {"stainnorm_transform": json.dumps({"surprise": 1})}
    if kind == "no recipe":
        metadata = {"stainnorm_transform": json.dumps({"target": "t", "config": [1]})}
    return safetensors.torch.save(tensors, metadata)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing tensor", r"Missing key\(s\).*stem\.weight"),
        ("extra tensor", "Unexpected key"),
        ("wrong shape", "size mismatch for stem.weight"),
        ("nan", "finite"),
        ("no metadata", "ColorNormNet"),
        ("bad json", "ColorNormNet"),
        ("unknown fields", "ColorNormNet"),
        ("no recipe", "ColorNormNet"),
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
    monkeypatch.setitem(weights.SHA256, weights.DEFAULT, "0" * 64)
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

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        weights.save(ColorNormNet(), path, TrainConfig())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
