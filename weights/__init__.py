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
import safetensors.torch

from stainnorm_transform.files import replacing
from stainnorm_transform.network import ColorNormNet

if TYPE_CHECKING:
    from stainnorm_transform.training import TrainConfig

DEFAULT = "camelyon17"
# Other names of shipped weights.
ALIASES = {"camelyon17": "camelyon17-center1"}
METADATA_KEY = "stainnorm_transform"
MAX_BYTES = 1_000_000
# What networks were trained with outside of their config: the color shift, tissue and scales. Raised when these change.
FORMAT = 1

# Shipped weights, NAME.safetensors beside this file: name -> sha256.
SHA256 = {
    "camelyon17-center0": "d754bdb157830f4cfc520e6f999de7aa833c0c098fb2a77e3186dcacd6fed100",
    "camelyon17-center1": "702f829fda45e4ce50a524cd27eba5bcab617067413dec634956cffc9281431d",
    "camelyon17-center2": "fea1dd44f1036c7880a2fe400fa04e19069723c8c20e5d10a9c01252a451655a",
    "camelyon17-center3": "f7008a16e8ede6f18a68ed61be00c0d2c5978a5f52209f094d79b1f2c5f8b0bd",
    "camelyon17-center4": "f7780be6332571903fc7fb1736cbbb72f22879a2d278814b5ab8d546723ea41b",
    "camelyon17-paper": "79103d401b0e3ce5c6c0e5e47bd4e418d915dede7c7cbd758014d83e41b9505b",
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


def load(name_or_path: str | os.PathLike[str] = DEFAULT) -> Weights:
    """Loads shipped weights by name, or a weights file by path (anything with a folder or the suffix ``.safetensors``).

    Raises:
        ValueError: the name is unknown, or the file is not a whole weights file of this package.
        FileNotFoundError: there is no such file.
    """
    name = os.fspath(name_or_path)
    name = ALIASES.get(name, name)
    if name in SHA256:
        path = Path(__file__).with_name(f"{name}.safetensors")
    elif Path(name).suffix == ".safetensors" or Path(name).name != name:
        path = Path(name)
    else:
        raise ValueError(
            f"expected the name of shipped weights ({', '.join(names())}) or the path of a .safetensors file, "
            f"got {name!r}"
        )
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"expected a weights file of at most {MAX_BYTES} bytes, got {path.stat().st_size} in {path}")
    content = path.read_bytes()
    if name in SHA256 and hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise ValueError(f"{path} is damaged: its sha256 is not the one published for {name!r}")
    try:
        tensors = safetensors.torch.load(content)
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})[METADATA_KEY])
        if not isinstance(metadata, dict):
            raise TypeError("its metadata is no dictionary")
        if (number := metadata.pop("format", 0)) != FORMAT:
            raise ValueError(f"{path} has format {number}, this version of the package reads {FORMAT}: train it again")
        network = ColorNormNet()
        network.load_state_dict(tensors)
        weights = Weights(network, **metadata)
        if not isinstance(weights.config["preserve_white"], bool):
            raise TypeError("config.preserve_white is not a bool")
    except safetensors.SafetensorError as error:
        raise ValueError(f"expected a safetensors file, got {path}: {error}") from error
    except (RuntimeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"expected the weights of a ColorNormNet, got {path}: {error}") from error
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"expected finite weights, got NaN or infinity in {path}")
    network.eval().requires_grad_(False)
    return weights


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
