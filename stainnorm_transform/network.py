"""ColorNormNet: the network that predicts how far a Lab image is from the target's colors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stainnorm_transform.eager import eager_on_cpu

FILTERS = 3
LAYERS = 3
LEAK = 0.01
DILATIONS = (1, 2, 4, 1)
# Added to variances by batch norm.
_EPS = 1e-5
# Images of more pixels are convolved, which takes less memory.
_MATRIX_PIXELS = 1 << 17


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
    trains it, passes it by. Batch norms are folded to a factor and a term for each filter.
    """

    lab_shift: Tensor
    lab_scale: Tensor
    offset_scale: Tensor
    stem_weight: Tensor
    stem_bias: Tensor
    # Of each block, for the features before each layer, the weight that each layer gives them, 0 before they are known:
    # (blocks, LAYERS, LAYERS, FILTERS, FILTERS, 3, 3).
    layers_weight: Tensor
    # (blocks, FILTERS, FILTERS (LAYERS + 1)).
    transition_weight: Tensor
    # Of each block, those of its layers and of its transition: (blocks, LAYERS + 1, FILTERS).
    norm_factor: Tensor
    norm_term: Tensor
    head_weight: Tensor
    head_bias: Tensor

    # Tensors made in inference mode could not pass gradients later.
    @torch.inference_mode(False)
    def __init__(self, network: ColorNormNet | FrozenColorNormNet) -> None:
        super().__init__()
        state = network.state_dict()
        for name, tensor in (_folded(state) if isinstance(network, ColorNormNet) else state).items():
            self.register_buffer(name, tensor.detach().clone().float())

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.lab_scale.device

    def forward(self, lab: Tensor) -> Tensor:
        """As that of ColorNormNet in eval mode."""
        scaled = (lab - self.lab_shift) / self.lab_scale
        if self._is_for_matrices(scaled):
            return torch.stack([self._by_matrices(image) for image in scaled]) * self.offset_scale
        features = F.conv2d(scaled, self.stem_weight, self.stem_bias, padding=1)
        for block, dilation in enumerate(DILATIONS):
            for layer in range(LAYERS):
                weight = self.layers_weight[block, : layer + 1, layer].transpose(0, 1).flatten(1, 2)
                new = F.conv2d(features, weight, padding=dilation, dilation=dilation)
                features = torch.cat([features, self._normalized(new, block, layer)], dim=1)
            mixed = F.conv2d(features, self.transition_weight[block, :, :, None, None])
            features = self._normalized(mixed, block, LAYERS)
        return F.conv2d(features, self.head_weight, self.head_bias, padding=1) * self.offset_scale

    def _normalized(self, features: Tensor, block: int, layer: int) -> Tensor:
        factor, term = (norm[block, layer, :, None, None] for norm in (self.norm_factor, self.norm_term))
        return torch.addcmul(term, F.leaky_relu(features, LEAK), factor)

    def _is_for_matrices(self, batch: Tensor) -> bool:
        tensors = batch, *self.buffers()
        if not eager_on_cpu(*tensors) or any(tensor.requires_grad for tensor in tensors):
            return False
        return bool(len(batch)) and batch.shape[-2:].numel() <= _MATRIX_PIXELS

    def _by_matrices(self, image: Tensor) -> Tensor:
        """Of one image (3, H, W): products of matrices, which are faster than convolutions of so few channels."""
        size = image.shape[-2:]
        features = image.new_empty(LAYERS + 1, FILTERS, *size)
        of_layers = features.unbind()
        sums = image.new_empty(LAYERS, FILTERS, *size)
        to_layers, all_sums = sums.unbind(), sums.view(LAYERS * FILTERS, -1)
        around = image.new_empty(9 * FILTERS, size.numel())
        at_distance = {dilation: _Surroundings(image, dilation) for dilation in set(DILATIONS)}
        # Of all blocks, one after the other.
        weights = self.layers_weight.reshape(-1, LAYERS * FILTERS, 9 * FILTERS).unbind()
        factors, terms = (norm.reshape(-1, FILTERS, 1, 1).unbind() for norm in (self.norm_factor, self.norm_term))

        def convolve(source: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            seen = at_distance[1].write(source, around)
            return torch.addmm(bias[:, None], weight.flatten(1), seen).view(image.shape)

        def finish(values: Tensor, norm: int, out: Tensor) -> None:
            torch.addcmul(terms[norm], F.leaky_relu(values, LEAK), factors[norm], out=out)

        of_layers[0].copy_(convolve(image, self.stem_weight, self.stem_bias))
        for block, dilation in enumerate(DILATIONS):
            sums.zero_()
            for layer, to_layer in enumerate(to_layers):
                # What the newest features add to this layer and to all that follow.
                seen = at_distance[dilation].write(of_layers[layer], around)
                all_sums.addmm_(weights[LAYERS * block + layer], seen)
                finish(to_layer, (LAYERS + 1) * block + layer, of_layers[layer + 1])
            mixed = self.transition_weight[block] @ features.view(-1, size.numel())
            finish(mixed.view(image.shape), (LAYERS + 1) * block + LAYERS, of_layers[0])
        return convolve(of_layers[0], self.head_weight, self.head_bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}stem.weight" in state_dict:
            _fold_old_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for name, tensor in self.named_buffers():
            # With assign=True the buffers are the state's own tensors: of its dtype, and perhaps parameters.
            setattr(self, name, tensor.detach().float())


def _fold_old_state(state_dict: dict[str, Any], prefix: str) -> None:
    """Makes the state of a ColorNormNet, as version 0.1.0 had it, that of a FrozenColorNormNet.

    What is not quite one is left, and told as unexpected.
    """
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in ColorNormNet().state_dict().items()}
    # How many batches were seen, which was not kept, does not matter.
    state = {name: state_dict.get(prefix + name) for name in expected if not name.endswith("num_batches_tracked")}
    if all(tensor is not None and tensor.shape == expected[name] for name, tensor in state.items()):
        for name in expected:
            state_dict.pop(prefix + name, None)
        folded = _folded({name: tensor for name, tensor in state.items() if tensor is not None})
        state_dict.update({prefix + name: tensor for name, tensor in folded.items()})


class _Surroundings:
    """What each pixel of images (3, H, W) has around it, at a distance; beyond the border, 0."""

    def __init__(self, image: Tensor, dilation: int) -> None:
        channels, height, width = image.shape
        padded = image.new_zeros(channels, height + 2 * dilation, width + 2 * dilation)
        channel, row, column = padded.stride()
        self._inside = padded[:, dilation : dilation + height, dilation : dilation + width]
        self._shape = (channels, 3, 3, height, width)
        self._around = padded.as_strided(self._shape, (channel, dilation * row, dilation * column, row, column))

    def write(self, image: Tensor, out: Tensor) -> Tensor:
        """Those of an image to ``out``: (9 C, H W)."""
        self._inside.copy_(image)
        out.view(self._shape).copy_(self._around)
        return out


def _folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """That of a FrozenColorNormNet, from the state of a ColorNormNet."""
    layers, transitions, factors, terms = [], [], [], []
    for number in range(len(DILATIONS)):
        names = [f"blocks.{number}.layers.{layer}" for layer in range(LAYERS)]
        weights = [state[f"{name}.0.weight"] for name in names]
        padded = [F.pad(weight, (0, 0, 0, 0, 0, FILTERS * LAYERS - weight.shape[1])) for weight in weights]
        layers.append(torch.stack([torch.unflatten(weight, 1, (LAYERS, FILTERS)) for weight in padded]).movedim(2, 0))
        transition = f"blocks.{number}.transition"
        transitions.append(state[f"{transition}.0.weight"].flatten(1))
        mean, variance, weight, bias = (
            torch.stack([state[f"{name}.2.{part}"] for name in (*names, transition)]).double()
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        factors.append(weight * torch.rsqrt(variance + _EPS))
        terms.append(bias - mean * factors[-1])
    return {
        **{name: state[name] for name in ("lab_shift", "lab_scale", "offset_scale")},
        **{f"{name}_{part}": state[f"{name}.{part}"] for name in ("stem", "head") for part in ("weight", "bias")},
        "layers_weight": torch.stack(layers),
        "transition_weight": torch.stack(transitions),
        "norm_factor": torch.stack(factors).float(),
        "norm_term": torch.stack(terms).float(),
    }
