"""One file, image or slide, to its output and its line in the record."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from stainnorm_transform import __version__
from stainnorm_transform.color import shift_ab
from stainnorm_transform.estimate import map_of, offset_of, tissue_sums
from stainnorm_transform.files import temporary_beside
from stainnorm_transform.folders import images
from stainnorm_transform.folders.offsets import Offsets, Shift
from stainnorm_transform.folders.outcome import FULL, Outcome
from stainnorm_transform.folders.record import DAMAGED, Basis, Record, Source
from stainnorm_transform.resources import choose_device, one_torch_thread
from stainnorm_transform.slides import Slide, SlideFormat, formats, is_slide, slide_normalizer, write_slide
from stainnorm_transform.slides.profile import color_cube, color_profile
from stainnorm_transform.transform import NormalizeStain

# Of the damaged parts of a slide, so many are named.
NAMED = 5
# What is said of a label mask.
_COPIED = "few flat colors, as in a label mask: copied as it is"
_NO_TISSUE = "no tissue was found, colors are as they were"
# The middle of a TIFF, of so many pixels a side, tells nearly every scan from a label mask.
_MIDDLE = 256
# Told how many more pixels of a slide are done, and of how many.
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Settings:
    """How files are normalized.

    Args:
        out: the folder of the outputs and their record.
        weights: name or path.
        device: as for ``choose_device``.
        offsets: given shifts instead of estimates.
        slide_format: how slides are written.
        to_srgb: whether slides are converted to sRGB by their ICC profile.
        mpp: micrometers a pixel, of slides that do not say.
        skip_damaged: whether what cannot be decoded of a slide becomes white, instead of an error.
        threads: to read and write a slide with.
    """

    out: Path
    weights: str
    device: str | None = None
    offsets: Offsets | None = None
    slide_format: SlideFormat = field(default_factory=SlideFormat)
    to_srgb: bool = False
    mpp: float | None = None
    skip_damaged: bool = False
    threads: int = 1


class FileNormalizer:
    """Normalizes files as the settings say.

    Raises:
        ValueError: weights, device or record cannot be used.
        OSError: they cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.transform = NormalizeStain.pretrained(settings.weights).to(choose_device(settings.device))
        self.record = Record(settings.out, _made_by(self.transform))

    def output_name(self, path: Path, below: Path) -> Path:
        """How the output of a file at ``below`` is named: as its input, but for slides."""
        if not is_slide(path):
            return below
        # Names of DICOM files may have no suffix, but numbers with dots.
        name = below.stem if below.suffix.lower() in formats.SUFFIXES + formats.TIFF_SUFFIXES else below.name
        stem = name[:-4] if name.lower().endswith(".ome") else name
        return below.with_name(stem + self.settings.slide_format.suffix)

    def is_current(self, path: Path, output: Path) -> bool:
        """Whether the output is there, as these settings make it of this file."""
        how = self._how(path)
        if self.settings.skip_damaged:
            how += _damage(self.record.damaged(output))
        return self.record.is_current(path, output, how)

    def earlier(self, output: Path) -> Outcome:
        """The outcome of a file that an earlier run finished."""
        damaged = self.record.damaged(output)
        note = f"{_parts(damaged)} became white, in an earlier run" if damaged else ""
        if self.settings.offsets is None and self.record.basis(output).tiles is None:
            note = _COPIED
        return Outcome(earlier=True, note=note)

    def outcome(self, path: Path, output: Path, progress: Progress = lambda pixels, total: None) -> Outcome:
        """As ``normalize``, with whatever goes wrong."""
        start = time.monotonic()
        try:
            note = self.normalize(path, output, progress)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
                error = OSError(error.errno, error.strerror, str(output))
            return Outcome.of(error, path)
        return Outcome(note=note or "", seconds=time.monotonic() - start)

    def normalize(self, path: Path, output: Path, progress: Progress = lambda pixels, total: None) -> str | None:
        """Writes the output and its line in the record, which must be open. Returns what is to be said of it."""
        source = self.record.source(path, self._how(path))
        output.parent.mkdir(parents=True, exist_ok=True)
        if is_slide(path):
            return self._slide(source, path, output, progress)
        formats.refuse_unread(path)
        return self._image(source, path, output)

    def _slide(self, source: Source, path: Path, output: Path, progress: Progress) -> str | None:
        chosen, threads = self.settings, self.settings.threads
        given = self._given(path)
        transform = self.transform if given is None else self.transform.with_map(given.color_map)
        with Slide(path, chosen.to_srgb, chosen.mpp, chosen.skip_damaged) as slide:
            total = slide.dimensions[0] * slide.dimensions[1]
            progress(0, total)
            if _is_mask(slide):
                progress(total, total)
                if chosen.slide_format.icc:
                    raise ValueError("few flat colors, as in a label mask, whose colors are not those of a stain")
                return self._copied(source, path, output)
            found = slide_normalizer(slide, transform, threads)
            fixed, tiles = found.normalize, found.tiles
            color_map = cast(Tensor, fixed.fixed_map)
            basis = Basis(tiles, found.left_out, found.standard_error)
            shift = given or Shift(found.offset, color_map, basis)
            if chosen.slide_format.icc:
                self._profile(source, slide, fixed, shift, output)
                progress(total, total)
                return None if tiles != 0 else _NO_TISSUE
            with temporary_beside(output) as temporary:
                file_format = chosen.slide_format
                write_slide(slide, temporary, fixed, file_format, threads, lambda pixels: progress(pixels, total))
                how = _damage(len(slide.damaged))
                self._add(source, output, shift, temporary, how)
            notes = []
            if slide.damaged:
                notes.append(_white(slide.damaged))
            if tiles == 0:
                notes.append(_NO_TISSUE)
            if slide.mpp and not chosen.slide_format.ome and not 0.99 < slide.mpp[0] / slide.mpp[1] < 1.01:
                notes.append("pixels are not square, OpenSlide will give the mean of their sides")
            if slide.mpp is None:
                notes.append("the slide does not say its resolution, nor does the result: --mpp gives it")
        return "; ".join(notes) or None

    def _profile(self, source: Source, slide: Slide, fixed: NormalizeStain, shift: Shift, output: Path) -> None:
        table = output.with_suffix(".cube")
        if os.path.lexists(table) and not self.record.has(output):
            raise ValueError(f"{table} would be written, which is there and was not made by this command: remove it")
        with temporary_beside(output) as temporary, temporary_beside(table) as temporary_table:
            temporary.write_bytes(color_profile(slide, fixed))
            temporary_table.write_text(color_cube(fixed))
            self._add(source, output, shift, temporary, beside={temporary_table: table})

    def _image(self, source: Source, path: Path, output: Path) -> str | None:
        if self.settings.slide_format.icc:
            raise ValueError("expected a slide, got an image, which has no profile of its own: leave out --icc")
        image = images.read(path)
        if images.is_mask(image):
            return self._copied(source, path, output)
        content, shift = _normalized(self.transform, image, output.suffix, self._given(path))
        with temporary_beside(output) as temporary:
            temporary.write_bytes(content)
            self._add(source, output, shift, temporary)
        return None

    def _copied(self, source: Source, path: Path, output: Path) -> str:
        with temporary_beside(output) as temporary:
            shutil.copyfile(path, temporary)
            self._add(source, output, Shift.of_offset(0, 0), temporary)
        return _COPIED

    def _add(
        self,
        source: Source,
        output: Path,
        shift: Shift,
        temporary: Path,
        how: str = "",
        beside: Mapping[Path, Path] = MappingProxyType({}),
    ) -> None:
        numbers = shift.offset.tolist(), shift.color_map.flatten().tolist()
        self.record.add(source, output, *numbers, temporary, how, shift.basis, beside)

    def _given(self, path: Path) -> Shift | None:
        return None if self.settings.offsets is None else self.settings.offsets.of(path)

    def _how(self, path: Path) -> str:
        """What a result depends on besides weights and version."""
        how = ""
        if (given := self._given(path)) is not None:
            # A pure offset reads as on the command line.
            numbers = given.color_map if given.color_map[:, 1:].any() else given.color_map[:, 0]
            how += " offset " + ",".join(str(round(value, 6)) for value in numbers.flatten().tolist())
        if is_slide(path):
            chosen = self.settings.slide_format
            if chosen.icc:
                return how + " icc"
            how += " lossless" if chosen.quality is None else f" quality {chosen.quality}"
            how += " label" * chosen.keep_label + " srgb" * self.settings.to_srgb
            if self.settings.mpp is not None:
                how += f" mpp {self.settings.mpp}"
        return how


def _is_mask(slide: Slide) -> bool:
    """Whether a slide is a label mask: a TIFF of not too many pixels, in which nothing tells who the patient is."""
    width, height = slide.dimensions
    if not slide.is_plain_tiff or width * height >= formats.SLIDE_PIXELS:
        return False
    side = min(_MIDDLE, width), min(_MIDDLE, height)
    middle = Image.fromarray(slide.pixels((width - side[0]) // 2, (height - side[1]) // 2, *side)[..., :3])
    if middle.getcolors(images.MASK_COLORS) is None:
        return False
    return images.is_mask(Image.fromarray(slide.pixels(0, 0, width, height)[..., :3]))


def _normalized(transform: NormalizeStain, image: Image.Image, suffix: str, shift: Shift | None) -> tuple[bytes, Shift]:
    """The file of an image after normalizing, with its transparency, and what was taken away: by default, estimated."""
    device = transform.network.device
    colors = pil_to_tensor(image.convert("RGB")).to(device)
    seen = colors if image.mode == "RGB" else pil_to_tensor(images.flatten(image)).to(device)
    if shift is None:
        with one_torch_thread(), torch.inference_mode():
            sums = tissue_sums(transform.network, seen, transform.preserve_white)
        shift = _finite(Shift(offset_of(sums), map_of(sums, transform.slopes), Basis(int(sums[0, 0] > 0))))
    after = to_pil_image(shift_ab(colors, -shift.color_map, transform.preserve_white).cpu())
    if image.mode == "RGBA":
        after.putalpha(image.getchannel("A"))
    return images.encode(after, suffix, like=image), shift


def _damage(parts: int) -> str:
    """What the record says of a slide of which so many parts became white."""
    return f" {DAMAGED} {parts}" if parts else ""


def _parts(count: int) -> str:
    return f"{count} damaged part{'s' * (count > 1)}"


def _white(parts: Sequence[tuple[int, int, int, int]]) -> str:
    """What is said of the parts of a slide that became white."""
    places = [f"x = {x}, y = {y} of {width} x {height} pixels" for x, y, width, height in parts[:NAMED]]
    more = f", and {len(parts) - NAMED} more" if len(parts) > NAMED else ""
    return f"{_parts(len(parts))} became white, at {', '.join(places)}{more}"


def _finite(shift: Shift) -> Shift:
    if not shift.color_map.isfinite().all():
        raise ValueError(f"the weights give a color map that is not finite: {shift.color_map.tolist()}")
    return shift


def _made_by(transform: NormalizeStain) -> str:
    digest = hashlib.sha256(str(transform.preserve_white).encode() + b"offsets" * (not transform.slopes))
    for tensor in transform.buffers():
        digest.update(tensor.cpu().numpy().tobytes())
    return f"stainnorm {__version__} {transform.target} {digest.hexdigest()[:12]}"
