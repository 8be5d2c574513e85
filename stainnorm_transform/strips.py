"""Shifts of images on the CPU: the arithmetic of ``color.shift_ab`` in few passes over strips that stay in cache."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stainnorm_transform import cie

# The memory of a strip takes 68 bytes a pixel. Larger ones leave the cache, smaller ones are too many calls.
_STRIP_PIXELS = 1 << 16

# The bits of a float, over 3, plus this are about those of its cube root y: for r = x / y**3 in [0.84, 1], the cube
# root is then y times this polynomial in r, to 2e-8. Twice as fast as by logarithm.
_CUBE_ROOT_BITS = 710_240_000
_CUBE_ROOT = (0.43982919, 0.95871573, -0.62635874, 0.28392294, -0.05610914)

# Linear light in so many bins that each has the border of one level at most.
_BINS = 4096


class Linear(NamedTuple):
    """A linear function of f(X), f(Z) and f(Y), by what they are multiplied with."""

    f_x: float = 0.0
    f_z: float = 0.0
    f_y: float = 0.0
    constant: float = 0.0


class Change(NamedTuple):
    """What a shift adds to f(X), f(Z) and f(Y).

    Attributes:
        to_x: to f(X), of pixels that take the whole shift.
        to_z: to f(Z), the same.
        to_y: to f(Y), the same; None if L* stays.
        below_white: how far a pixel is from white, in shares of a shift.
        above_black: how far it is from black.
    """

    to_x: Linear
    to_z: Linear
    to_y: Linear | None
    below_white: Linear
    above_black: Linear


def shift(image: Tensor, out: Tensor, change: Change) -> None:
    """Writes to ``out`` what becomes of an image (3, H, W), of uint8 or floating point, computed in float32.

    Both may have any layout.
    """
    height, width = image.shape[-2:]
    rows = min(max(1, _STRIP_PIXELS // width), height)
    strip = _Strip(rows * width, image.dtype)
    weights = torch.tensor([part or Linear() for part in change], dtype=torch.float32, device="cpu")
    # Each call then takes less.
    with torch.inference_mode():
        for source, target in split(image, out, rows):
            if source.shape[-2] != rows:
                strip = _Strip(source.shape[-2] * width, image.dtype)
            target.copy_(strip.shifted(source, weights, change.to_y is not None).view(source.shape))


def split(image: Tensor, out: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An image and its result, in strips of so many rows."""
    return zip(torch.split(image, rows, dim=-2), torch.split(out, rows, dim=-2), strict=True)


class _Memory(threading.local):
    """What each thread keeps, as fresh memory costs as much as the arithmetic: that of the largest strip, 4.5 MB."""

    def __init__(self) -> None:
        self._kept: dict[torch.dtype, Tensor] = {}

    # Tensors made in inference mode could not be written to later.
    @torch.inference_mode(False)
    def of(self, rows: int, pixels: int, dtype: torch.dtype) -> Tensor:
        """Of this shape, with what was there before."""
        size = rows * pixels
        kept = self._kept.get(dtype)
        if kept is None or len(kept) < size:
            kept = torch.empty(size, dtype=dtype, device="cpu")
            # Of a row that is longer than a strip, it is not.
            if pixels <= _STRIP_PIXELS:
                self._kept[dtype] = kept
        return kept[:size].view(rows, pixels)


_memory = _Memory()


class _Strip:
    """The memory of a strip of so many pixels, and what is done in it."""

    def __init__(self, pixels: int, dtype: torch.dtype) -> None:
        self.is_bytes = dtype == torch.uint8
        self.index = _memory.of(1, pixels if self.is_bytes else 0, torch.int64)[0]
        # Three rows are of R, G and B, or of X, Z and Y: what moves at constant L* lies together.
        self.linear, self.xzy, self.f_and_one, self.terms = _memory.of(15, pixels, torch.float32).split_with_sizes(
            (3, 3, 4, 5)
        )
        self.f = self.f_and_one[:3]
        self.f_and_one[3] = 1
        # Asked once, as it takes as long as a product.
        self.multiply = _multiply if _is_exact() else _multiply_by_rows

    def shifted(self, image: Tensor, weights: Tensor, lighter: bool) -> Tensor:
        """An image (3, H, W), shifted by a Change, (5, 4), that moves L* or not: (3, H W), of uint8 as int32."""
        if self.is_bytes:
            levels, steps = _tables()
            self._look_up(levels, self.xzy.view(torch.int32).view(image.shape).copy_(image), self.linear)
        else:
            self.xzy.view(image.shape).copy_(image).clamp_(0, 1)
            cie.decode(self.xzy, out=self.linear, spare=self.xzy)
        self._move(weights, lighter)
        if not self.is_bytes:
            return cie.encode(self.linear, out=self.xzy, spare=self.linear).clamp_(0, 1)
        bins = self.terms[:3].view(torch.int32).copy_(self.linear.clamp_(0, _BINS))
        self._look_up(steps, bins, self.xzy)
        # From float to uint8 at once is slower.
        return bins.copy_(self.xzy.add_(self.linear))

    def _look_up(self, table: Tensor, index: Tensor, out: Tensor) -> None:
        # By int32, which is faster to make of other numbers than int64 is; but int64 is faster to look up.
        for of_channel, channel in zip(index, out, strict=True):
            torch.index_select(table, 0, self.index.copy_(of_channel.view(-1)), out=channel)

    def _move(self, weights: Tensor, lighter: bool) -> None:
        """Moves ``linear``, which is not clamped."""
        to_xzy, from_xzy = _matrices(_BINS if self.is_bytes else 1)
        self.multiply(to_xzy, self.linear, self.xzy)
        # So that NaN, which is not below, is dark as well.
        dark = not float(self.xzy.amin()) >= cie.EPSILON
        if dark:
            below = torch.clamp(self.xzy - cie.EPSILON, max=0)
            self.xzy.clamp_(min=cie.EPSILON)
        self._cube_root()
        if dark:
            self.f.add_(below, alpha=cie.KAPPA / 116)

        self.multiply(weights, self.f_and_one, self.terms)
        below_white, above_black = self.terms[3:]
        share = torch.minimum(below_white, above_black.clamp_(0, 1), out=below_white).clamp_(min=0)
        moving = 3 if lighter else 2
        f, moved = self.f[:moving], self.terms[:moving].mul_(share)
        moved.add_(f)
        # As in kornia and scikit-image, f(Z) stops at 0.
        moved[1].clamp_(min=0)
        if dark or not float(moved.amin()) >= cie.F_KNEE:
            moved = cie.f_inverse(moved).sub_(cie.f_inverse(f))
        else:
            # Of the same f, so that its error hardly shows in the difference.
            torch.pow(moved, 3, out=moved).sub_(torch.pow(f, 3, out=self.xzy[:moving]))
        self.multiply(from_xzy[:, :moving], moved, self.linear, add=True)

    def _cube_root(self) -> None:
        """Of ``xzy``, which is lost, to ``f``."""
        ratio, bits = self.terms[:3], self.f.view(torch.int32)
        shift, coefficients = _constants()
        bits.copy_(torch.add(shift, ratio.copy_(self.xzy.view(torch.int32)), alpha=1 / 3, out=ratio))
        torch.div(self.xzy, torch.pow(self.f, 3, out=ratio), out=ratio)
        factor = torch.add(coefficients[-2], ratio, alpha=_CUBE_ROOT[-1], out=self.xzy)
        for coefficient in coefficients[-3::-1]:
            torch.addcmul(coefficient, factor, ratio, out=factor)
        self.f.mul_(factor)


def _multiply(matrix: Tensor, rows: Tensor, out: Tensor, add: bool = False) -> None:
    """Writes a product of matrices to ``out``, or adds it."""
    out.addmm_(matrix, rows, beta=int(add))


def _multiply_by_rows(matrix: Tensor, rows: Tensor, out: Tensor, add: bool = False) -> None:
    """The same without a product of matrices."""
    for weights, target in zip(matrix.tolist(), out, strict=True):
        for number, (weight, row) in enumerate(zip(weights, rows, strict=True)):
            if number or add:
                target.add_(row, alpha=weight)
            else:
                torch.mul(row, weight, out=target)


def _is_exact() -> bool:
    """Whether torch computes products of matrices of float32 in float32, which users may choose."""
    mkldnn = torch.backends.mkldnn
    if not hasattr(mkldnn, "matmul"):  # torch before 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return {place.fp32_precision for place in (torch.backends, mkldnn, mkldnn.matmul)} <= {"none", "ieee"}


@functools.cache
def _matrices(white: float) -> tuple[Tensor, Tensor]:
    """Linear light, of which white has this much, to X, Z and Y, and back."""
    order = [0, 2, 1]
    to_xzy = torch.tensor(cie.M, dtype=torch.float64, device="cpu")[order] / white
    from_xzy = torch.tensor(cie.M_INV, dtype=torch.float64, device="cpu")[:, order] * white
    return to_xzy.float(), from_xzy.float()


@functools.cache
def _tables() -> tuple[Tensor, Tensor]:
    """The linear light of every level, in bins, and for every bin what makes light a level: ``floor(light + step)``."""
    level = torch.arange(256, dtype=torch.float64, device="cpu")
    borders = _BINS * cie.decode((level[1:] - 0.5) / 255)
    start = torch.arange(_BINS + 1, dtype=torch.float64, device="cpu")
    lower = torch.searchsorted(borders, start, right=True)
    border = torch.cat([borders, borders.new_full((1,), torch.inf)])[lower]
    steps = torch.where(border < start + 1, lower + 1 - border, lower - start)
    return (_BINS * cie.decode(level / 255)).float(), steps.float()


@functools.cache
def _constants() -> tuple[Tensor, list[Tensor]]:
    """As tensors, with which a pass adds and multiplies."""
    shift = torch.tensor(float(_CUBE_ROOT_BITS), dtype=torch.float32, device="cpu")
    return shift, [torch.tensor(value, dtype=torch.float32, device="cpu") for value in _CUBE_ROOT]
