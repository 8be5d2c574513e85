"""Training: weights for a target of your own."""

from stainnorm_transform.training.config import TrainConfig
from stainnorm_transform.training.evaluation import error_metrics, offset_errors
from stainnorm_transform.training.loop import Report, print_measured, train

__all__ = ["Report", "TrainConfig", "error_metrics", "offset_errors", "print_measured", "train"]
