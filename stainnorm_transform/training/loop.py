"""Training a ColorNormNet on images of the target, without pairs: it learns to undo known shifts of a*, b*."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stainnorm_transform.color import color_terms, fade, rgb_to_lab, shift_batch
from stainnorm_transform.files import check_regular
from stainnorm_transform.network import ColorNormNet
from stainnorm_transform.resources import one_torch_thread
from stainnorm_transform.training import checkpoint as checkpoints
from stainnorm_transform.training.config import TrainConfig
from stainnorm_transform.training.crops import Batch, batches, crop_colors, each_image
from stainnorm_transform.training.distributed import from_first, mean_over_processes, parallel, rank_and_count
from stainnorm_transform.training.evaluation import copy_with_tissue, mean_error


@dataclass(frozen=True)
class Report:
    """Where a run stands after an iteration.

    Attributes:
        iteration: how many are done.
        loss: mean since the last measurement.
        held_out_error: (a*, b*) in Lab units, as last measured; None before, or without held-out images.
        measured: whether this iteration ended with a measurement and a checkpoint.
    """

    iteration: int
    loss: float
    held_out_error: tuple[float, float] | None
    measured: bool

    def __str__(self) -> str:
        text = f"iteration {self.iteration}: loss {self.loss:.2f}"
        if self.held_out_error is not None:
            text += ", held-out error a* {:.2f}, b* {:.2f}".format(*self.held_out_error)
        return text


def print_measured(report: Report) -> None:
    """Prints a report if it is of a measurement."""
    if report.measured:
        print(report, flush=True)


@one_torch_thread()
def train(
    images: Any,
    config: TrainConfig | None = None,
    *,
    held_out: Any = (),
    device: str | torch.device = "cpu",
    workers: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    report: Callable[[Report], None] = print_measured,
) -> ColorNormNet:
    """Trains a network whose target is the color of ``images``.

    Each iteration takes crops of random images at random scales, shifts the colors of each by a random map, see
    ``color.shift_ab``, and asks the network how far each pixel was shifted; the loss is L1 + lambda * L2 over the
    tissue, of the pixels and of their mean. In the second half of the run batch norm is frozen.

    The same images, config and kind of processor give the same network, whatever ``workers`` and the number of torch
    threads are, and however often the run was interrupted. On the CPU one thread is used: small batches gain little by
    more.

    In an initialized ``torch.distributed`` process group, all processes call this together with the same arguments;
    each computes its part of every batch, and the first measures, reports and writes.

    Args:
        images: images of the target, of any sizes from ``config.crop``: a list or map-style dataset, from which all are
            drawn equally often, or an iterable, such as a DataLoader, that gives the same images in the same order
            whenever it is read. An image is a PIL image of mode RGB or a tensor (3, H, W), uint8 or floating point in
            [0, 1], alone, first in a tuple, or as ``image`` in a dict, as of a ``SlideTiles`` that does not normalize;
            an iterable may also give batches (N, 3, H, W). Images are not kept.
        config: the recipe.
        held_out: images of the target, with tissue, that are not in ``images``, to measure ``Report.held_out_error``
            on. Small copies of them are kept.
        device: where to train.
        workers: processes that read a map-style dataset.
        checkpoint: a file for the state of the run, written at the start and at every measurement. If it exists, the
            run goes on from it; whether the images are the same is checked on a few hundred crops. It stays when the
            run is done.
        report: called after every iteration; by default prints the measurements.

    Returns:
        The network, on the CPU, frozen and in eval mode.

    Raises:
        TypeError: something that is no image.
        ValueError: there are no images, one is smaller than a crop, none has tissue, the loss is not finite, or the
            checkpoint is of another run.
        OSError: the checkpoint cannot be written.
    """
    config = config or TrainConfig()
    part = rank, count = rank_and_count()
    if workers < 0:
        raise ValueError(f"expected workers >= 0, got {workers}")
    if config.batch_size % count:
        raise ValueError(f"expected a batch_size that {count} processes can share, got {config.batch_size}")
    network = _initial(config.seed).to(device)
    trained = parallel(network) if count > 1 else network
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    copies = [copy_with_tissue(image).to(device) for image in each_image(held_out)] if rank == 0 else []

    start = 0
    if checkpoint is not None:
        path = Path(checkpoint)
        is_there = rank == 0 and path.exists()
        if is_there:
            check_regular(path)
        content = from_first(path.read_bytes() if is_there else None, torch.device(device))
        colors = crop_colors(images, config)
        if content is not None:
            try:
                start = checkpoints.restore(content, network, optimizer, config, colors)
            except ValueError as problem:
                raise ValueError(f"cannot go on from {path}: {problem}") from problem
        if rank == 0:
            # Now rather than after hours; twice, because the second needs room beside the first, as every later one.
            for _ in range(2):
                checkpoints.save(path, network, optimizer, start, config, colors)

    losses: list[float] = []
    error = None
    for iteration, batch in enumerate(batches(images, config, start, part=part, workers=workers), start=start + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warmup_cosine((iteration - 1) / config.iterations)
        _set_mode(network, frozen=iteration > config.iterations // 2)
        loss = shift_loss(trained, Batch(*(values.to(device) for values in batch)), config)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(mean_over_processes(loss.detach()).item())
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"the loss is {losses[-1]} at iteration {iteration}: start again with a lower learning rate"
            )
        measured = iteration % config.report_every == 0 or iteration == config.iterations
        if rank == 0:
            if measured and copies:
                error = mean_error(network, copies, config.preserve_white)
            if measured and checkpoint is not None:
                checkpoints.save(path, network, optimizer, iteration, config, colors)
            report(Report(iteration, sum(losses) / len(losses), error, measured))
        if measured:
            losses = []

    result = _initial(config.seed)
    result.load_state_dict(network.state_dict())
    return result.eval().requires_grad_(False)


def _initial(seed: int) -> ColorNormNet:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ColorNormNet()


def _set_mode(network: nn.Module, frozen: bool) -> None:
    """Training mode; ``frozen`` batch norm keeps its statistics and normalizes by them, as in use."""
    for module in network.modules():
        module.training = not (frozen and isinstance(module, nn.BatchNorm2d))


def warmup_cosine(progress: float) -> float:
    """Learning rate as a share of its peak, ``progress`` in [0, 1]: a tenth of linear warm-up within a half cosine."""
    return min(1.0, 0.01 + progress / 0.1) * (1 + math.cos(math.pi * progress)) / 2


def shift_loss(network: nn.Module, batch: Batch, config: TrainConfig) -> Tensor:
    """The self-supervised loss: crops are shifted by maps, and the network is to predict how far each pixel was."""
    lab = rgb_to_lab(batch.crops)
    distance = torch.einsum("nij,njyx->niyx", batch.shift, color_terms(lab))
    if config.preserve_white:
        distance = distance * fade(lab[:, :1])
    shifted = rgb_to_lab(shift_batch(batch.crops, config.preserve_white, batch.shift))
    weight = batch.weight / batch.weight.sum(dim=(-1, -2), keepdim=True).clamp(min=1e-6)
    error = network(_jittered(shifted, weight, batch.jitter, config)) - F.pad(distance, (0, 0, 0, 0, 1, 0))

    def l1_l2(error: Tensor) -> Tensor:
        return error.abs() + config.l2_weight * error**2

    of_pixels = (weight * l1_l2(error)).sum(dim=(-1, -2)).mean()
    of_mean = l1_l2((weight * error).sum(dim=(-1, -2))).mean()
    return of_pixels + of_mean


def _jittered(lab: Tensor, weight: Tensor, jitter: Tensor, config: TrainConfig) -> Tensor:
    """Lab crops as other labs might stain and scan them, with the mean a*, b* of the tissue kept.

    Labs differ in how dark and how contrasted tissue is; these are no reason to expect another a*, b*.
    """
    lightness, color = lab[:, :1], lab[:, 1:]
    contrast, darkness = jitter[..., None, None, None].unbind(dim=1)
    share = fade(lightness) if config.preserve_white else torch.ones_like(lightness)
    weight = weight * share
    mean = (weight * color).sum(dim=(-1, -2), keepdim=True) / weight.sum(dim=(-1, -2), keepdim=True).clamp(min=1e-6)
    color = color + share * (contrast - 1) * (color - mean)
    return torch.cat([(100 - darkness * (100 - lightness)).clamp(min=0), color], dim=1)
