"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


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
    slope: float = _setting(
        0.3, "standard deviation of how much a shift changes with color, per Lab unit; 0 trains for offsets alone"
    )
    contrast_jitter: float = _setting(0.25, "contrast of a* and b* within a crop times up to exp(+-this), at random")
    darkness_jitter: float = _setting(0.35, "darkness (100 - L*) of a crop times up to exp(+-this), at random")
    preserve_white: bool = _setting(True, "fade shifts out towards white and black; in the paper they do not")
    learning_rate: float = _setting(0.01, "learning rate of Adam at the peak of its schedule")
    l2_weight: float = _setting(0.1, "lambda in the loss L1 + lambda * L2, per Lab unit")
    min_tissue: float = _setting(0.3, "least share of tissue in a crop")
    report_every: int = _setting(100, "iterations between measurements, and between checkpoints")
    seed: int = _setting(0, "seed of crops, shifts and the initial network")

    def __post_init__(self) -> None:
        for name in ("max_offset", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"expected a finite {name} > 0, got {getattr(self, name)}")
        for name in ("slope", "l2_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"expected a finite {name} >= 0, got {getattr(self, name)}")
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
