"""The state of a training run in a safetensors file, from which it goes on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from stainnorm_transform.files import replacing
from stainnorm_transform.network import ColorNormNet
from stainnorm_transform.training.config import TrainConfig

# Raised when a run of an earlier version cannot be continued as it began.
FORMAT = 3
COLORS, METADATA = "colors", "metadata"


def save(
    path: str | os.PathLike[str],
    network: ColorNormNet,
    optimizer: torch.optim.Adam,
    iteration: int,
    config: TrainConfig,
    colors: Tensor,
) -> None:
    """Writes the state after ``iteration``, whole or not at all.

    Args:
        path: the file, replaced if it exists.
        network: the network.
        optimizer: of its parameters.
        iteration: how many are done.
        config: the recipe.
        colors: mean colors of some crops, by which ``restore`` tells whether the images are the same.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        # Before the first step Adam has no state yet; this is what it starts from.
        fresh = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter)}
        fresh["exp_avg_sq"] = fresh["exp_avg"].clone()
        state = optimizer.state.get(parameter) or fresh
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    tensors[COLORS] = colors
    metadata = json.dumps({"format": FORMAT, "iteration": iteration, "config": dataclasses.asdict(config)})
    # As a tensor, because safetensors reads the metadata of a file only, not of bytes.
    tensors[METADATA] = torch.tensor(list(metadata.encode()), dtype=torch.uint8)
    content = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def restore(
    content: bytes,
    network: ColorNormNet,
    optimizer: torch.optim.Adam,
    config: TrainConfig,
    colors: Tensor,
) -> int:
    """Puts the state of a checkpoint file into the network and the optimizer; returns how many iterations are done.

    Raises:
        ValueError: it is no whole checkpoint, or that of a run with another config or other images.
    """
    try:
        tensors = safetensors.torch.load(content)
        metadata: dict[str, Any] = json.loads(bytes(tensors[METADATA].tolist()))
        if metadata["format"] != FORMAT:
            raise ValueError("it is of another version of the package")
        saved_config, iteration, saved_colors = metadata["config"], metadata["iteration"], tensors[COLORS]
        # JSON has lists for tuples.
        wanted = json.loads(json.dumps(dataclasses.asdict(config)))
        names = sorted(name for name in {*saved_config, *wanted} if saved_config.get(name) != wanted.get(name))
        # With other settings there is more to say.
        if not names and not 0 <= iteration <= config.iterations:
            raise ValueError(f"it ends after {iteration} of {config.iterations} iterations")
        if not names and saved_colors.shape == colors.shape and torch.allclose(saved_colors, colors, atol=1e-3):
            network.load_state_dict(_below(tensors, "network."))
            parameters = dict(network.named_parameters())
            state = {number: _below(tensors, f"optimizer.{name}.") for number, name in enumerate(parameters)}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
            return int(iteration)
    except (safetensors.SafetensorError, RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"expected the checkpoint of a training run: {error}") from error
    if names:
        changed = ", ".join(f"{name} {saved_config.get(name)}, now {wanted.get(name)}" for name in names)
        raise ValueError(
            f"the run had other settings ({changed}): give the same, or remove the checkpoint to start again"
        )
    raise ValueError(
        "the run had other images, or the same in another order: give the same, or remove the checkpoint to start again"
    )


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
