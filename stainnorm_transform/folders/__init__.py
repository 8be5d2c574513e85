"""Folders of images and slides: what is found, normalized, written and recorded."""

from stainnorm_transform.folders.normalizer import FileNormalizer, Settings
from stainnorm_transform.folders.offsets import Offsets
from stainnorm_transform.folders.outcome import Outcome
from stainnorm_transform.folders.plan import Plan, find, make_plan
from stainnorm_transform.folders.record import Record
from stainnorm_transform.folders.targets import TargetImages

__all__ = ["FileNormalizer", "Offsets", "Outcome", "Plan", "Record", "Settings", "TargetImages", "find", "make_plan"]
