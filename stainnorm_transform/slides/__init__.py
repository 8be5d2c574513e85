"""Whole slides: reading, one color map for each, a dataset of their tissue, and writing (extra ``slides``)."""

from stainnorm_transform.slides.dataset import SlideTiles
from stainnorm_transform.slides.formats import is_slide
from stainnorm_transform.slides.reader import Slide
from stainnorm_transform.slides.sampling import slide_normalizer, tissue_shares
from stainnorm_transform.slides.writer import SlideFormat, write_slide

__all__ = ["Slide", "SlideFormat", "SlideTiles", "is_slide", "slide_normalizer", "tissue_shares", "write_slide"]
