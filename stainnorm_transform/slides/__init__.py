"""Whole slides: reading, one color map for each, a dataset of their tissue, and writing (extra ``slides``)."""

from typing import TYPE_CHECKING, Any

from stainnorm_transform.slides.dataset import SlideTiles
from stainnorm_transform.slides.formats import is_slide
from stainnorm_transform.slides.reader import Slide
from stainnorm_transform.slides.sampling import slide_normalizer, tissue_shares
from stainnorm_transform.slides.writer import SlideFormat, write_slide

if TYPE_CHECKING:
    from stainnorm_transform.slides.normalized import NormalizedSlide

__all__ = [
    "NormalizedSlide",
    "Slide",
    "SlideFormat",
    "SlideTiles",
    "is_slide",
    "slide_normalizer",
    "tissue_shares",
    "write_slide",
]

if not TYPE_CHECKING:  # where it would hide misspelled names

    def __getattr__(name: str) -> Any:
        # It is an OpenSlide class, and OpenSlide comes with an extra.
        if name == "NormalizedSlide":
            from stainnorm_transform.slides.normalized import NormalizedSlide

            return NormalizedSlide
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
