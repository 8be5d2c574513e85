"""Training a ColorNormNet on images of the target, without pairs: it learns to undo known a*, b* offsets."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stainnorm_transform import checkpoint as checkpoints
from stainnorm_transform.color import fade, random_offset, rgb_to_lab, shift_batch
from stainnorm_transform.crops import Batch, batches, crop_colors, each_image
from stainnorm_transform.distributed import from_first, mean_over_processes, parallel, rank_and_count
from stainnorm_transform.estimate import has_tissue, mean_offset, small_copy, sums_of_copies
from stainnorm_transform.files import check_regular
from stainnorm_transform.network import ColorNormNet


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """What a training run depends on besides its images; ``stainnorm train --help`` says what each setting is.

    Optimizer and loss are those of arXiv 2011.15000. Its learning rate of 0.001 left larger held-out errors after the
    same number of iterations; the rest is ours.
    """

    iterations: int = _setting(1600, "batches to train on")
    batch_size: int = _setting(16, "crops in a batch, over all processes")
    crop: int = _setting(32, "side of a crop in pixels, after downsampling")
    scales: tuple[float, float] = _setting((2.0, 16.0), "area-downsampling of crops, drawn log-uniformly between these")
    max_offset: float = _setting(40.0, "largest shift of a* and b*, in Lab units")
    contrast_jitter: float = _setting(0.5, "contrast of a* and b* within a crop times up to exp(+-this), at random")
    darkness_jitter: float = _setting(0.35, "darkness (100 - L*) of a crop times up to exp(+-this), at random")
    preserve_white: bool = _setting(True, "fade shifts out from L* = 60 to 97; without it as in the paper, everywhere")
    learning_rate: float = _setting(0.01, "learning rate of Adam at the peak of its schedule")
    l2_weight: float = _setting(0.1, "lambda in the loss L1 + lambda * L2, per Lab unit")
    min_tissue: float = _setting(0.3, "least share of tissue in a crop")
    report_every: int = _setting(100, "iterations between measurements, and between checkpoints")
    seed: int = _setting(0, "seed of crops, shifts and the initial network")

    def __post_init__(self) -> None:
        for name in ("max_offset", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"expected a finite {name} > 0, got {getattr(self, name)}")
        if not 0 <= self.l2_weight < math.inf:
            raise ValueError(f"expected a finite l2_weight >= 0, got {self.l2_weight}")
        for name in ("contrast_jitter", "darkness_jitter"):
            if not 0 <= getattr(self, name) <= 2:
                raise ValueError(f"expected 0 <= {name} <= 2, got {getattr(self, name)}")
        if not 0 < self.min_tissue <= 1:
            raise ValueError(f"expected 0 < min_tissue <= 1, got {self.min_tissue}")
        for name in ("iterations", "batch_size", "crop", "report_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"expected a whole number {name} >= 1, got {getattr(self, name)}")
        if not isinstance(self.preserve_white, bool):
            raise ValueError(f"expected preserve_white True or False, got {self.preserve_white!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"expected a whole number seed from 0 to 2**63 - 1, got {self.seed}")
        if len(self.scales) != 2 or not 1 <= self.scales[0] <= self.scales[1] < math.inf:
            raise ValueError(f"expected scales (low, high) with 1 <= low <= high, got {self.scales}")


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

    Each iteration takes crops of random images at random scales, shifts each by a random (da, db), and asks the network
    for that offset; the loss is L1 + lambda * L2 over the tissue, of the map and of its mean, which is the offset
    that NormalizeStain uses. In the second half of the run batch norm is frozen.

    The same images, config and device give the same network, whatever ``workers`` is and however often the run was
    interrupted.

    In an initialized ``torch.distributed`` process group, all processes call this together with the same arguments;
    each computes its part of every batch, and the first measures, reports and writes.

    Args:
        images: images of the target, of any sizes from ``config.crop``: a list or map-style dataset, from which all are
            drawn equally often, or an iterable, such as a DataLoader, that gives the same images in the same order
            whenever it is read. An image is a PIL image of mode RGB or a tensor (3, H, W), uint8 or floating point in
            [0, 1], alone or first in a tuple; an iterable may also give batches (N, 3, H, W). Images are not kept.
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
    copies = [_with_tissue(image).to(device) for image in each_image(held_out)] if rank == 0 else []

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
        loss = offset_loss(trained, Batch(*(values.to(device) for values in batch)), config)
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
                error = _mean_error(network, copies, config)
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


def offset_loss(network: nn.Module, batch: Batch, config: TrainConfig) -> Tensor:
    """The self-supervised loss: crops are shifted by the offsets, which the network is to predict."""
    shifted = rgb_to_lab(shift_batch(batch.crops, batch.offset, config.preserve_white))
    weight = batch.weight / batch.weight.sum(dim=(-1, -2), keepdim=True).clamp(min=1e-6)
    error = network(_jittered(shifted, weight, batch.jitter, config)) - F.pad(batch.offset, (1, 0))[..., None, None]

    def l1_l2(error: Tensor) -> Tensor:
        return error.abs() + config.l2_weight * error**2

    of_map = (weight * l1_l2(error)).sum(dim=(-1, -2)).mean()
    of_mean = l1_l2((weight * error).sum(dim=(-1, -2))).mean()
    return of_map + of_mean


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
    copies = (_with_tissue(image).to(network.device) for image in each_image(images))
    return _errors_of_copies(network, copies, preserve_white, max_offset, draws)


def error_metrics(errors: Tensor) -> dict[str, Any]:
    """Summary and mean absolute a*, b* of what ``offset_errors`` returned, as metrics of a weights file."""
    a_error, b_error = errors.abs().mean(dim=(0, 1)).tolist()
    return {
        "summary": f"held-out offset error a* {a_error:.2f}, b* {b_error:.2f} Lab units, n = {len(errors)} images",
        "held_out_error": {"a": round(a_error, 3), "b": round(b_error, 3)},
    }


def _with_tissue(image: Tensor) -> Tensor:
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
        shifted = shift_batch(copy.expand(draws, -1, -1, -1), offset.to(network.device), preserve_white)
        errors.append(mean_offset(sums_of_copies(network, shifted))[:, 1:].cpu() - offset)
    if not errors:
        raise ValueError("expected at least one image, got none")
    return torch.stack(errors)


def _mean_error(network: ColorNormNet, copies: Sequence[Tensor], config: TrainConfig) -> tuple[float, float]:
    network.eval()
    a_error, b_error = _errors_of_copies(network, copies, config.preserve_white).abs().mean(dim=(0, 1)).tolist()
    return a_error, b_error
