"""Stain normalization of H&E images with ColorNormNet, as torchvision transforms."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stainnorm_transform import color, estimate, files, network, resources, training, transform, weights  # noqa: F401
    from stainnorm_transform.network import ColorNormNet
    from stainnorm_transform.training import TrainConfig, train
    from stainnorm_transform.transform import NormalizeStain, PerturbStain

__version__ = "0.2.0.dev0"

__all__ = ["ColorNormNet", "NormalizeStain", "PerturbStain", "TrainConfig", "train"]

_MODULES = ("color", "estimate", "files", "network", "resources", "training", "transform", "weights")
_MODULE_OF = {
    "ColorNormNet": "network",
    "NormalizeStain": "transform",
    "PerturbStain": "transform",
    "TrainConfig": "training",
    "train": "training",
}

if not TYPE_CHECKING:  # where it would hide misspelled names

    def __getattr__(name: str) -> Any:
        # Imported when they are asked for: torch and kornia take seconds, and `stainnorm --help` needs neither.
        if name in _MODULE_OF:
            return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
