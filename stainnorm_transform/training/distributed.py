"""Training in several processes with torch.distributed: every process has an equal part of each batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stainnorm_transform.network import ColorNormNet


def rank_and_count() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) outside of a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    _, count = rank_and_count()
    if count > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value / count


def from_first(content: bytes | None, device: torch.device) -> bytes | None:
    """What the first process gives, in all of them."""
    if rank_and_count()[1] == 1:
        return content
    size = torch.tensor([-1 if content is None else len(content)], device=device)
    dist.broadcast(size, 0)
    if size < 0:
        return None
    values = torch.tensor(list(content or bytes(int(size))), dtype=torch.uint8, device=device)
    dist.broadcast(values, 0)
    return bytes(values.tolist())


def parallel(network: ColorNormNet) -> nn.Module:
    """The network as one process of several trains it: gradients and batch-norm statistics are those of all."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                synchronized = BatchNorm(child.num_features, child.eps, child.momentum).to(child.weight.device)
                synchronized.load_state_dict(child.state_dict())
                setattr(module, name, synchronized)
    return DistributedDataParallel(network)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of all processes; unlike ``nn.SyncBatchNorm`` also on the CPU."""

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        _, count = rank_and_count()
        dims = (0, 2, 3)
        mean = _Sum.apply(input.mean(dims)) / count
        centered = input - mean[:, None, None]
        variance = _Sum.apply(centered.square().mean(dims)) / count
        with torch.no_grad():
            pixels = count * input.numel() / self.num_features
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * pixels / (pixels - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return centered * scale[:, None, None] + self.bias[:, None, None]


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; what each does with it counts in the gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)
