"""Training a ColorNormNet on tiles of the target, without pairs: it learns to undo known a*, b* offsets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_lab
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stainnorm_transform.color import check_image, random_offset, shift_ab
from stainnorm_transform.estimate import mean_offset, small_copy, sums_of_copies, tissue_weight
from stainnorm_transform.network import ColorNormNet


@dataclass(frozen=True)
class TrainConfig:
    """What a training run depends on besides its tiles.

    Optimizer and loss are those of arXiv 2011.15000. Its learning rate of 0.001 left larger held-out errors after the
    same number of iterations; the rest is ours.
    """

    iterations: int = 1500
    batch_size: int = 32  # crops
    crop: int = 48  # pixels, after downsampling
    scales: tuple[float, float] = (1.0, 8.0)  # area-downsampling factors, drawn log-uniformly
    max_offset: float = 40.0  # da, db ~ U(-max_offset, max_offset), Lab units
    preserve_white: bool = True  # offsets fade out from L* = 80 to 97; False: uniform, as in the paper
    learning_rate: float = 0.005  # Adam, peak of the schedule
    l2_weight: float = 0.1  # lambda in L1 + lambda * L2, per Lab unit
    min_tissue: float = 0.3  # share of a crop
    report_every: int = 100  # iterations
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_offset", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"expected a finite {name} > 0, got {getattr(self, name)}")
        if not 0 < self.min_tissue <= 1:
            raise ValueError(f"expected 0 < min_tissue <= 1, got {self.min_tissue}")
        for name in ("iterations", "batch_size", "crop", "report_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        if len(self.scales) != 2 or not 1 <= self.scales[0] <= self.scales[1]:
            raise ValueError(f"expected scales (low, high) with 1 <= low <= high, got {self.scales}")


@dataclass(frozen=True)
class Report:
    """Where a run stands: ``loss`` is the mean since the last report, ``held_out_error`` (a*, b*) in Lab units."""

    iteration: int
    loss: float
    held_out_error: tuple[float, float] | None

    def __str__(self) -> str:
        text = f"iteration {self.iteration}: loss {self.loss:.2f}"
        if self.held_out_error is not None:
            text += ", held-out error a* {:.2f}, b* {:.2f}".format(*self.held_out_error)
        return text


def train(
    tiles: Sequence[Tensor],
    config: TrainConfig | None = None,
    *,
    held_out: Sequence[Tensor] = (),
    device: str | torch.device = "cpu",
    report: Callable[[Report], None] = print,
) -> ColorNormNet:
    """Trains a network whose target is the color of ``tiles``.

    Each iteration takes crops of random tiles at random scales, shifts each by a random (da, db), and asks the network
    for that offset; the loss is L1 + lambda * L2 over the tissue, of the map and of its mean, which is the offset
    that NormalizeStain uses. The same tiles, config and device give the same network.

    Args:
        tiles: sRGB images of the target, a list or a map-style dataset of tensors of shape (3, H, W), uint8 or
            floating point in [0, 1], of any sizes from ``config.crop``. All are drawn equally often.
        config: the recipe.
        held_out: images of the target that are not in ``tiles``, to measure ``Report.held_out_error`` on.
        device: where to train.
        report: called every ``config.report_every`` iterations and at the end; prints by default.

    Returns:
        The network, on the CPU, frozen and in eval mode.

    Raises:
        ValueError: there are no tiles, one is smaller than a crop, none has tissue, or the loss is not finite.
    """
    config = config or TrainConfig()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = ColorNormNet().to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step / config.iterations))
    # The generator keeps the loader from drawing from the caller's.
    loader = DataLoader(_Crops(tiles, config), batch_size=config.batch_size, generator=torch.Generator())
    losses: list[float] = []
    for iteration, (crops, offset) in enumerate(loader, start=1):
        crops, offset = crops.to(device), offset.to(device)
        loss = offset_loss(network, crops, offset, config)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} at iteration {iteration}: lower the learning rate")
        if iteration % config.report_every == 0 or iteration == config.iterations:
            error = None
            if len(held_out):
                network.eval()
                a_error, b_error = (
                    offset_errors(network, held_out, config.preserve_white).abs().mean(dim=(0, 1)).tolist()
                )
                error = (a_error, b_error)
                network.train()
            report(Report(iteration, sum(losses) / len(losses), error))
            losses = []
    return network.cpu().eval().requires_grad_(False)


def warmup_cosine(progress: float) -> float:
    """Learning rate as a share of its peak, ``progress`` in [0, 1]: a tenth of linear warm-up within a half cosine."""
    return min(1.0, 0.01 + progress / 0.1) * (1 + math.cos(math.pi * progress)) / 2


def offset_loss(network: ColorNormNet, crops: Tensor, offset: Tensor, config: TrainConfig) -> Tensor:
    """The self-supervised loss: crops (N, 3, H, W) in RGB are shifted by ``offset`` (N, 2), which is then predicted."""
    source = rgb_to_lab(shift_ab(crops, offset, config.preserve_white))
    weight = tissue_weight(rgb_to_lab(crops))
    weight = weight / weight.sum(dim=(-1, -2), keepdim=True).clamp(min=1e-6)
    error = network(source) - F.pad(offset, (1, 0))[..., None, None]

    def l1_l2(error: Tensor) -> Tensor:
        return error.abs() + config.l2_weight * error**2

    of_map = (weight * l1_l2(error)).sum(dim=(-1, -2)).mean()
    of_mean = l1_l2((weight * error).sum(dim=(-1, -2))).mean()
    return of_map + of_mean


@torch.no_grad()
def offset_errors(
    network: ColorNormNet,
    images: Sequence[Tensor],
    preserve_white: bool = True,
    *,
    max_offset: float = 30.0,
    draws: int = 16,
) -> Tensor:
    """How wrong the offsets of images of the target are after shifts that are known.

    Args:
        network: in eval mode.
        images: images of the target, shape (3, H, W), of any sizes.
        preserve_white: as the network was trained.
        max_offset: shifts are uniform in [-max_offset, max_offset], Lab units, the same on every call.
        draws: shifts per image.

    Returns:
        Estimated minus true (a*, b*), Lab units, shape (images, draws, 2).
    """
    offset = random_offset((draws,), max_offset, torch.Generator().manual_seed(0))
    errors = []
    for image in images:
        copies = small_copy(image[None].to(network.device)).expand(draws, -1, -1, -1)
        shifted = shift_ab(copies, offset.to(network.device), preserve_white)
        errors.append(mean_offset(sums_of_copies(network, shifted))[:, 1:].cpu() - offset)
    return torch.stack(errors)


class _Crops(Dataset[tuple[Tensor, Tensor]]):
    """Crops of tiles with the offsets to shift them by; item ``index`` depends on the seed and the index alone."""

    attempts = 100

    def __init__(self, tiles: Sequence[Tensor], config: TrainConfig) -> None:
        if len(tiles) == 0:
            raise ValueError("expected at least one tile, got none")
        self.tiles = tiles
        self.config = config

    def __len__(self) -> int:
        return self.config.iterations * self.config.batch_size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index >= len(self):
            raise IndexError(index)
        generator = torch.Generator().manual_seed((self.config.seed << 32) + index)
        for _ in range(self.attempts):
            crop = self._crop(generator)
            if (tissue_weight(rgb_to_lab(crop)) > 0).float().mean() >= self.config.min_tissue:
                return crop[0], random_offset((), self.config.max_offset, generator)
        raise ValueError(
            f"no crop with {self.config.min_tissue:.0%} tissue in {self.attempts} draws from {len(self.tiles)} tiles: "
            "are they H&E images?"
        )

    def _crop(self, generator: torch.Generator) -> Tensor:
        tile = self.tiles[_randint(len(self.tiles), generator)]
        check_image(tile)
        if tile.ndim != 3:
            raise ValueError(f"expected tiles of shape (3, H, W), got {tuple(tile.shape)}")
        height, width = tile.shape[-2:]
        crop = self.config.crop
        if min(height, width) < crop:
            raise ValueError(f"expected tiles of at least {crop} x {crop} pixels, got {height} x {width}")
        low, high = (math.log(scale) for scale in self.config.scales)
        scale = math.exp(low + (high - low) * float(torch.rand((), generator=generator)))
        side = min(round(crop * scale), height, width)
        top, left = _randint(height - side + 1, generator), _randint(width - side + 1, generator)
        region = small_copy(tile[None, :, top : top + side, left : left + side], side / crop)
        turned = torch.rot90(region, _randint(4, generator), dims=(-2, -1))
        return turned.flip(-1) if _randint(2, generator) else turned


def _randint(stop: int, generator: torch.Generator) -> int:
    return int(torch.randint(stop, (), generator=generator))
