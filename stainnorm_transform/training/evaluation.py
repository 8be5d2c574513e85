"""How wrong the offsets of a network are, on images of the target that were not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from stainnorm_transform.color import random_offset, shift_batch
from stainnorm_transform.estimate import has_tissue, offset_of, small_copy, sums_of_copies
from stainnorm_transform.network import ColorNormNet
from stainnorm_transform.training.crops import each_image


def offset_errors(
    network: ColorNormNet,
    images: Any,
    preserve_white: bool = True,
    *,
    max_offset: float = 30.0,
    draws: int = 16,
) -> Tensor:
    """How wrong the offsets of images of the target are after shifts that are known.

    Args:
        network: in eval mode.
        images: images of the target, as for ``train``.
        preserve_white: as the network was trained.
        max_offset: shifts are uniform in [-max_offset, max_offset], Lab units, the same on every call.
        draws: shifts per image.

    Returns:
        Estimated minus true (a*, b*), Lab units, shape (images, draws, 2).

    Raises:
        ValueError: there are no images, or one has no tissue.
    """
    copies = (copy_with_tissue(image).to(network.device) for image in each_image(images))
    return _errors_of_copies(network, copies, preserve_white, max_offset, draws)


def error_metrics(errors: Tensor) -> dict[str, Any]:
    """Summary and mean absolute a*, b* of what ``offset_errors`` returned, as metrics of a weights file."""
    a_error, b_error = errors.abs().mean(dim=(0, 1)).tolist()
    return {
        "summary": f"held-out offset error a* {a_error:.2f}, b* {b_error:.2f} Lab units, n = {len(errors)} images",
        "held_out_error": {"a": round(a_error, 3), "b": round(b_error, 3)},
    }


def copy_with_tissue(image: Tensor) -> Tensor:
    """The small copy of an image (3, H, W): (1, 3, h, w). Raises ValueError where it has no tissue."""
    copy = small_copy(image[None])
    if not has_tissue(copy):
        raise ValueError("expected held-out images with tissue, got one without")
    return copy


@torch.no_grad()
def _errors_of_copies(
    network: ColorNormNet, copies: Iterable[Tensor], preserve_white: bool, max_offset: float = 30.0, draws: int = 16
) -> Tensor:
    offset = random_offset((draws,), max_offset, torch.Generator().manual_seed(0))
    errors = []
    for copy in copies:
        shifted = shift_batch(copy.expand(draws, -1, -1, -1), preserve_white, offset.to(network.device))
        errors.append(offset_of(sums_of_copies(network, shifted, preserve_white)).cpu() - offset)
    if not errors:
        raise ValueError("expected at least one image, got none")
    return torch.stack(errors)


def mean_error(network: ColorNormNet, copies: Sequence[Tensor], preserve_white: bool) -> tuple[float, float]:
    """Mean absolute (a*, b*) error on copies of ``copy_with_tissue``, Lab units; leaves the network in eval mode."""
    network.eval()
    a_error, b_error = _errors_of_copies(network, copies, preserve_white).abs().mean(dim=(0, 1)).tolist()
    return a_error, b_error
