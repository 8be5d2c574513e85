"""The state of a training run in a safetensors file, from which it goes on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from stainnorm_transform.files import replacing
from stainnorm_transform.network import ColorNormNet

if TYPE_CHECKING:
    from stainnorm_transform.training import TrainConfig

KEY = "stainnorm_transform.checkpoint"
FIRST_COLORS = "first_colors"


def save(
    path: str | os.PathLike[str],
    network: ColorNormNet,
    optimizer: torch.optim.Adam,
    iteration: int,
    config: TrainConfig,
    first_colors: Tensor,
) -> None:
    """Writes the state after ``iteration``, whole or not at all.

    Args:
        path: the file, replaced if it exists.
        network: the network.
        optimizer: of its parameters.
        iteration: how many are done.
        config: the recipe.
        first_colors: mean colors of the first crops, by which ``load`` tells whether the images are the same.
    """
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        # Before the first step Adam has no state yet; this is what it starts from.
        fresh = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter)}
        fresh["exp_avg_sq"] = fresh["exp_avg"].clone()
        state = optimizer.state.get(parameter) or fresh
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    tensors[FIRST_COLORS] = first_colors
    metadata = {KEY: json.dumps({"iteration": iteration, "config": dataclasses.asdict(config)})}
    with replacing(path) as temporary:
        safetensors.torch.save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata
        )


def load(
    path: str | os.PathLike[str],
    network: ColorNormNet,
    optimizer: torch.optim.Adam,
    config: TrainConfig,
    first_colors: Tensor,
) -> int:
    """Puts the saved state into the network and the optimizer and returns how many iterations are done.

    Raises:
        ValueError: the file is no whole checkpoint, or that of a run with another config or other images.
    """
    try:
        tensors = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = json.loads((file.metadata() or {})[KEY])
        saved_config, iteration = metadata["config"], int(metadata["iteration"])
        saved_colors = tensors[FIRST_COLORS]
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected the checkpoint of a training run, got {path}: {error}") from error
    # JSON has lists for tuples.
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    if saved_config != wanted:
        names = sorted(name for name in {*saved_config, *wanted} if saved_config.get(name) != wanted.get(name))
        changed = ", ".join(f"{name} {saved_config.get(name)}, now {wanted.get(name)}" for name in names)
        raise ValueError(f"{path} is of a run with other settings: {changed}")
    if saved_colors.shape != first_colors.shape or not torch.allclose(saved_colors, first_colors, atol=1e-3):
        raise ValueError(f"{path} is of a run with other images")
    try:
        network.load_state_dict(_below(tensors, "network."))
        parameters = dict(network.named_parameters())
        state = {number: _below(tensors, f"optimizer.{name}.") for number, name in enumerate(parameters)}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"expected the checkpoint of a training run, got {path}: {error}") from error
    return iteration


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
