"""Whether tensors are plain memory, so that an image can be worked piece by piece."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def eager_on_cpu(*tensors: Tensor) -> bool:
    """Whether images can be worked piece by piece, and values looked at, without a cost."""
    return tensors[0].device.type == "cpu" and is_eager(*tensors)


def untracked(function: Callable[[], Tensor], *tensors: Tensor) -> Tensor:
    """What a function of these tensors gives, by inference mode on the CPU, where each small operation takes less.

    As ever, where a gradient is recorded.
    """
    if not eager_on_cpu(*tensors) or torch.is_inference_mode_enabled():
        return function()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return function()
    with torch.inference_mode():
        out = function()
    # Outside, a tensor of inference mode could not pass gradients.
    return out.clone()


def is_eager(*tensors: Tensor) -> bool:
    """Whether nothing watches what is done with tensors: no compiler, and no transform of ``torch.func``."""
    return not torch.compiler.is_compiling() and _is_plain(*tensors)


def _is_plain(*tensors: Tensor) -> bool:
    """Whether tensors are memory, not stand-ins: those of ``torch.func``, dual numbers, fake tensors."""
    if is_wrapped(*tensors) or any(tensor.untyped_storage().device != tensor.device for tensor in tensors):
        return False
    return all(forward_ad.unpack_dual(tensor).tangent is None for tensor in tensors)  # type: ignore[no-untyped-call]


def is_wrapped(*tensors: Tensor) -> bool:
    """Whether one is a tensor of ``torch.func``, which has no memory of its own."""
    try:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # That of a fake tensor is elsewhere, and has no pointer.
            if storage.device == tensor.device:
                storage.data_ptr()
    except RuntimeError:
        return True
    return False
