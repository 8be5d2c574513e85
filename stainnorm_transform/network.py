"""ColorNormNet: the network that predicts how far a Lab image is from the target's colors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILTERS = 3
LAYERS = 3
LEAK = 0.01
_BATCH_NORM = ("running_mean", "running_var", "weight", "bias")
DILATIONS = (1, 2, 4, 1)


class ColorNormNet(nn.Module):
    """Predicts a CIELAB offset for every pixel: 2,352 trainable parameters, no pooling.

    Four DenseNet blocks of three 3x3 convolutions with three filters each, dilated in blocks 2 and 3, every
    convolution followed by leaky ReLU and batch norm. Any image size from 1 x 1 works. Lab is scaled to order one
    inside the network and the output scaled back, so callers never rescale.

    Source: A. Patil et al., "Fast, Self Supervised, Fully Convolutional Color Normalization of H&E Stained Images",
    ISBI 2021, arXiv 2011.15000. Where its text is silent (dilations, the place of the 1x1 convolutions) the composition
    is ours; it gives the paper's parameter count.

    Example:
        >>> ColorNormNet()(torch.zeros(2, 3, 64, 48)).shape
        torch.Size([2, 3, 64, 48])
    """

    lab_shift: Tensor
    lab_scale: Tensor
    offset_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, FILTERS, 3, padding=1)
        self.blocks = nn.Sequential(*(DenseBlock(dilation) for dilation in DILATIONS))
        self.head = nn.Conv2d(FILTERS, 3, 3, padding=1)
        self.register_buffer("lab_shift", torch.tensor([50.0, 0.0, 0.0]).view(3, 1, 1))
        self.register_buffer("lab_scale", torch.tensor([25.0, 20.0, 20.0]).view(3, 1, 1))
        self.register_buffer("offset_scale", torch.tensor(20.0))

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.lab_scale.device

    def forward(self, lab: Tensor) -> Tensor:
        """Maps a Lab image (N, 3, H, W), L* in [0, 100], to the offset map (N, 3, H, W) in Lab units."""
        features = self.stem((lab - self.lab_shift) / self.lab_scale)
        return self.head(self.blocks(features)) * self.offset_scale


class DenseBlock(nn.Module):
    """Three 3x3 convolutions, each on all features before it, and a 1x1 convolution back to ``FILTERS`` channels."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _layer(FILTERS * count, kernel_size=3, padding=dilation, dilation=dilation)
            for count in range(1, LAYERS + 1)
        )
        self.transition = _layer(FILTERS * (LAYERS + 1), kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """Maps (N, FILTERS, H, W) to the same shape."""
        for layer in self.layers:
            features = torch.cat([features, layer(features)], dim=1)
        return self.transition(features)


def _layer(channels: int, **convolution: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, FILTERS, bias=False, **convolution),  # type: ignore[arg-type]
        nn.LeakyReLU(LEAK),
        nn.BatchNorm2d(FILTERS),
    )


class FrozenColorNormNet(nn.Module):
    """A trained ColorNormNet that stays as it is: the same map, float32, from buffers alone.

    It has no parameters and no layers, so what initializes, prunes, quantizes or converts the layers of a model, or
    trains it, passes it by.
    """

    lab_shift: Tensor
    lab_scale: Tensor
    offset_scale: Tensor

    # Tensors made in inference mode could not pass gradients later.
    @torch.inference_mode(False)
    def __init__(self, network: ColorNormNet | FrozenColorNormNet) -> None:
        super().__init__()
        for name, tensor in network.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                self.register_buffer(_flat(name), tensor.detach().clone().float())

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.lab_scale.device

    def forward(self, lab: Tensor) -> Tensor:
        """As that of ColorNormNet in eval mode."""
        features = self._convolve("stem", (lab - self.lab_shift) / self.lab_scale)
        for number, dilation in enumerate(DILATIONS):
            for layer in range(LAYERS):
                new = self._layer(f"blocks_{number}_layers_{layer}", features, dilation, dilation)
                features = torch.cat([features, new], dim=1)
            features = self._layer(f"blocks_{number}_transition", features)
        return self._convolve("head", features) * self.offset_scale

    def _convolve(self, name: str, features: Tensor) -> Tensor:
        return F.conv2d(features, self.get_buffer(f"{name}_weight"), self.get_buffer(f"{name}_bias"), padding=1)

    def _layer(self, name: str, features: Tensor, padding: int = 0, dilation: int = 1) -> Tensor:
        features = F.conv2d(features, self.get_buffer(f"{name}_0_weight"), padding=padding, dilation=dilation)
        mean, variance, weight, bias = (self.get_buffer(f"{name}_2_{part}") for part in _BATCH_NORM)
        return F.batch_norm(F.leaky_relu(features, LEAK), mean, variance, weight, bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in [name for name in state_dict if name.startswith(prefix)]:
            # States of version 0.1.0 have the names of the layers.
            state_dict[prefix + _flat(name[len(prefix) :])] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for name, tensor in self.named_buffers():
            # With assign=True the buffers are the state's own tensors: of its dtype, and perhaps parameters.
            setattr(self, name, tensor.detach().float())


def _flat(name: str) -> str:
    return name.replace(".", "_")
