"""ColorNormNet: the network that predicts how far a Lab image is from the target's colors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FILTERS = 3
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
            _layer(FILTERS * count, kernel_size=3, padding=dilation, dilation=dilation) for count in (1, 2, 3)
        )
        self.transition = _layer(FILTERS * 4, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """Maps (N, FILTERS, H, W) to the same shape."""
        for layer in self.layers:
            features = torch.cat([features, layer(features)], dim=1)
        return self.transition(features)


def _layer(channels: int, **convolution: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, FILTERS, bias=False, **convolution),  # type: ignore[arg-type]
        nn.LeakyReLU(0.01),
        nn.BatchNorm2d(FILTERS),
    )
