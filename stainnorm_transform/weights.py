"""Trained networks: the shipped ones, and reading and writing of weights files (safetensors)."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from stainnorm_transform.eager import is_eager
from stainnorm_transform.files import check_regular, replacing
from stainnorm_transform.network import ColorNormNet

if TYPE_CHECKING:
    from stainnorm_transform.training.config import TrainConfig

DEFAULT = "camelyon17"
# Other names of shipped weights.
ALIASES = {"camelyon17": "camelyon17-center1"}
METADATA_KEY = "stainnorm_transform"
MAX_BYTES = 1_000_000
# Of the shipped weights: below the package where it is installed, beside it in a clone of the repository.
FOLDER = Path(__file__).with_name("shipped_weights")
if not FOLDER.is_dir():
    FOLDER = Path(__file__).parents[1] / "weights"
# What networks were trained with outside of their config: the color shift, tissue and scales. Raised when these change.
FORMAT = 3

# Shipped weights, FOLDER/NAME.safetensors: name -> sha256.
SHA256 = {
    "camelyon17-center0": "0cd8a18ef1c291fff02683cac4f6ec4c883fa18e275a10653a3e834b445b879f",
    "camelyon17-center1": "f294b0121e171b7ce0362e49b57fd258f2299496727d7d86fc5f76e6436859a3",
    "camelyon17-center2": "74d29b43a5413dd5224677c4ae371e217bdeb412c065fd8db03eb39f8fe983aa",
    "camelyon17-center3": "7fb05c4827a24650f2fae5f0d856f02619ad129123679e45febd60db1521baa6",
    "camelyon17-center4": "c97209c77cffbad092f266002ae8fca01d289df659b82f4899e089c7986369bc",
    "camelyon17-paper": "65690b9acd10a1478c996f04dccfeb19163ff44beee94baf4b36ba65e60e7b56",
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """A trained network and where it comes from.

    Attributes:
        network: the ColorNormNet, frozen and in eval mode.
        target: name of the colors it normalizes to.
        config: the fields of the TrainConfig it was trained with.
        data: what it was trained on.
        metrics: figures measured when it was trained.
        date: day of training, ISO 8601.
    """

    network: ColorNormNet
    target: str
    config: dict[str, Any]
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    date: str = ""


def names() -> list[str]:
    """Names of the shipped weights, aliases first."""
    return [*ALIASES, *SHA256]


@torch.inference_mode(False)
def load(name_or_path: str | os.PathLike[str] = DEFAULT) -> Weights:
    """Loads shipped weights by name, or a weights file by path (anything with a folder or the suffix ``.safetensors``).

    Raises:
        ValueError: the name is unknown, or the file is not a whole weights file of this package.
        FileNotFoundError: there is no such file.
    """
    name = os.fspath(name_or_path)
    name = ALIASES.get(name, name)
    if name in SHA256:
        path = FOLDER / f"{name}.safetensors"
    elif Path(name).suffix == ".safetensors" or Path(name).name != name:
        path = Path(name)
    else:
        raise ValueError(
            f"expected the name of shipped weights ({', '.join(names())}) or the path of a .safetensors file, "
            f"got {name!r}"
        )
    content = _read(path)
    if name in SHA256 and hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise ValueError(f"{path} is damaged: its sha256 is not the one published for {name!r}")
    try:
        # By NumPy, so that torch makes the tensors of whatever mode it is in, such as FakeTensorMode.
        tensors = {name: torch.tensor(array, device="cpu") for name, array in safetensors.numpy.load(content).items()}
        # By the format, 8 bytes of length and a header in JSON. The library gives metadata of files only, and a second
        # look at the file may see other bytes than those that were checked.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = json.loads(header.get("__metadata__", {})[METADATA_KEY])
        if not isinstance(metadata, dict):
            raise TypeError("its metadata is no dictionary")
        number = metadata.pop("format", 0)
        weights = _build(tensors, metadata) if number == FORMAT else None
    except safetensors.SafetensorError as error:
        raise ValueError(f"expected a safetensors file, got {path}: {error}") from error
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        # Among them those of deep JSON and of numbers with too many digits.
        text = " ".join(str(error).split())
        raise ValueError(f"expected the weights of a ColorNormNet, got {path}: {text}") from error
    if weights is None:
        raise ValueError(f"{path} has format {number!r}, this version of the package reads {FORMAT}: train it again")
    return weights


def _build(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> Weights:
    if any(tensor.is_complex() for tensor in tensors.values()):
        raise TypeError("its tensors are not all real")
    with torch.device("cpu"), torch.no_grad():
        network = ColorNormNet()
        if torch.get_default_dtype() != torch.float32:
            network.float()
        network.load_state_dict(tensors)
        weights = Weights(network.eval().requires_grad_(False), **metadata)
        # Finite weights may give offsets that are not, and so may a variance below 0.
        offset = network(torch.tensor([50.0, 20.0, -10.0], dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 8, 8))
    values = network.state_dict().values()
    if is_eager(*values) and not (all(value.isfinite().all() for value in values) and offset.abs().max() < 1000):
        raise ValueError("expected finite weights, and offsets below 1000 Lab units")
    if not isinstance(weights.config["preserve_white"], bool):
        raise TypeError("config.preserve_white is not a bool")
    if not isinstance(weights.config["slope"], float | int):
        raise TypeError("config.slope is not a number")
    if not isinstance(weights.target, str) or not weights.target.isprintable():
        raise TypeError("target is not a string that can be printed")
    return weights


def _read(path: Path) -> bytes:
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"expected a weights file of at most {MAX_BYTES} bytes, got {path.stat().st_size} in {path}")
    return content


def save(
    network: ColorNormNet,
    path: str | os.PathLike[str],
    config: TrainConfig,
    *,
    target: str | None = None,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Writes a weights file that ``load`` and ``NormalizeStain.pretrained`` read.

    Args:
        network: the trained network.
        path: the file to write, ``NAME.safetensors``; whole or not at all.
        config: what it was trained with.
        target: name of the target colors; by default the file's name.
        data: what it was trained on, as JSON values.
        metrics: measured figures, as JSON values.

    Raises:
        ValueError: the path does not end in ``.safetensors``.
        FileNotFoundError: its folder does not exist.
    """
    path = check_path(path)
    metadata = {
        "format": FORMAT,
        "target": target or path.stem,
        "config": dataclasses.asdict(config),
        "data": dict(data or {}),
        "metrics": dict(metrics or {}),
        "date": datetime.date.today().isoformat(),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    content = safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(metadata)})
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def check_path(path: str | os.PathLike[str]) -> Path:
    """The path of weights to write.

    Raises:
        ValueError: it does not end in ``.safetensors``.
        FileNotFoundError: its folder does not exist.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"expected a path ending in .safetensors, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of {path} does not exist")
    return path
