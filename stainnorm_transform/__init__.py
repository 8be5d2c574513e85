"""Stain normalization of H&E images with ColorNormNet, as torchvision transforms."""

from stainnorm_transform.network import ColorNormNet
from stainnorm_transform.training import TrainConfig, train
from stainnorm_transform.transform import NormalizeStain, PerturbStain

__version__ = "0.2.0.dev0"

__all__ = ["ColorNormNet", "NormalizeStain", "PerturbStain", "TrainConfig", "train"]
