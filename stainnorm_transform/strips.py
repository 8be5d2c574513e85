"""Shifts of images on the CPU: the arithmetic of ``color.shift_ab`` in few passes over strips that stay in cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stainnorm_transform import cie

# Memory of a strip takes 68 bytes a pixel. Larger ones leave the cache, smaller ones are too many calls.
_STRIP_PIXELS = 1 << 16

# The bits of a float, over 3, plus this are about those of its cube root y: for r = x / y**3 in [0.84, 1], the cube
# root is then y times this polynomial in r, to 2e-8. Twice as fast as by logarithm.
_CUBE_ROOT_BITS = 710_240_000
_CUBE_ROOT = (0.43982919, 0.95871573, -0.62635874, 0.28392294, -0.05610914)

# Linear light in so many bins that each has the border of one level at most.
_BINS = 4096


class Linear(NamedTuple):
    """A linear function of f(X), f(Y) and f(Z)."""

    constant: float = 0.0
    f_x: float = 0.0
    f_y: float = 0.0
    f_z: float = 0.0

    def of(self, f: Sequence[Tensor], out: Tensor) -> Tensor:
        """Its value, written to ``out``."""
        return _sum(f, self[1:], out).add_(self.constant)


class Change(NamedTuple):
    """What a shift adds to f(X), f(Y) and f(Z).

    Attributes:
        to_x: to f(X), of pixels that take the whole shift.
        to_z: to f(Z), the same.
        to_y: to f(Y), and so to all three, before black is kept; None if L* stays.
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
    for source, target in zip(torch.split(image, rows, dim=-2), torch.split(out, rows, dim=-2), strict=True):
        if source.shape[-2] != rows:
            strip = _Strip(source.shape[-2] * width, image.dtype)
        target.copy_(strip.shifted(source, change).view(source.shape))


class _Strip:
    """The memory of a strip of so many pixels, and what is done in it.

    No matrix products: what precision torch gives them is for users to choose.
    """

    def __init__(self, pixels: int, dtype: torch.dtype) -> None:
        self.is_bytes = dtype == torch.uint8
        self.white = _BINS if self.is_bytes else 1
        self.index = torch.empty(pixels if self.is_bytes else 0, dtype=torch.int64, device="cpu")
        self.linear, self.xyz, self.f, self.moved = (
            torch.empty(3, pixels, dtype=torch.float32, device="cpu") for _ in range(4)
        )
        self.share, self.from_black = torch.empty(2, pixels, dtype=torch.float32, device="cpu").unbind()

    def shifted(self, image: Tensor, change: Change) -> Tensor:
        """An image (3, H, W), shifted: (3, H W), of uint8 as int32."""
        if self.is_bytes:
            levels, steps = _tables()
            self._look_up(levels, self.xyz.view(torch.int32).view(image.shape).copy_(image), self.linear)
        else:
            self.xyz.view(image.shape).copy_(image).clamp_(0, 1)
            cie.decode(self.xyz, out=self.linear, spare=self.xyz)
        self._move(change)
        if not self.is_bytes:
            return cie.encode(self.linear, out=self.xyz, spare=self.linear).clamp_(0, 1)
        bins = self.moved.view(torch.int32).copy_(self.linear.clamp_(0, _BINS))
        self._look_up(steps, bins, self.xyz)
        # From float to uint8 at once is slower.
        return bins.copy_(self.xyz.add_(self.linear))

    def _look_up(self, table: Tensor, index: Tensor, out: Tensor) -> None:
        # By int32, which is faster to make of other numbers than int64 is; but int64 is faster to look up.
        for of_channel, channel in zip(index, out, strict=True):
            torch.index_select(table, 0, self.index.copy_(of_channel.view(-1)), out=channel)

    def _move(self, change: Change) -> None:
        """Moves ``linear``, which is not clamped."""
        rgb = self.linear.unbind()
        for row, value in zip(cie.M, self.xyz.unbind(), strict=True):
            _sum(rgb, [weight / self.white for weight in row], value)
        # So that NaN, which is not below, is dark as well.
        dark = not float(self.xyz.amin()) >= cie.EPSILON
        if dark:
            below = torch.clamp(self.xyz - cie.EPSILON, max=0)
            self.xyz.clamp_(min=cie.EPSILON)
        self._cube_root()
        if dark:
            self.f.add_(below, alpha=cie.KAPPA / 116)

        f = self.f.unbind()
        moved_x, moved_y, moved_z = self.moved.unbind()
        from_black = change.above_black.of(f, self.from_black).clamp_(0, 1)
        share = torch.minimum(change.below_white.of(f, self.share), from_black, out=self.share).clamp_(min=0)
        change.to_x.of(f, moved_x).mul_(share).add_(f[0])
        change.to_z.of(f, moved_z).mul_(share).add_(f[2])
        if change.to_y is not None:
            step = change.to_y.of(f, moved_y).mul_(from_black).add_(f[1]).clamp_(min=cie.F_BLACK).sub_(f[1])
            moved_x.add_(step)
            moved_z.add_(step)
            step.add_(f[1])
        else:
            moved_y.copy_(f[1])
        # As in kornia and scikit-image, f(Z) stops at 0.
        moved_z.clamp_(min=0)
        if dark or not float(self.moved.amin()) >= cie.F_KNEE:
            moved = cie.f_inverse(self.moved).sub_(cie.f_inverse(self.f))
        else:
            # Of the same f, so that its error hardly shows in the difference.
            moved = torch.pow(self.moved, 3, out=self.moved).sub_(torch.pow(self.f, 3, out=self.xyz))
        for row, channel in zip(cie.M_INV, rgb, strict=True):
            for axis, (weight, moved_by) in enumerate(zip(row, moved.unbind(), strict=True)):
                if axis != 1 or change.to_y is not None:
                    channel.add_(moved_by, alpha=weight * self.white)

    def _cube_root(self) -> None:
        """Of ``xyz``, which is lost, to ``f``."""
        ratio, bits = self.moved, self.f.view(torch.int32)
        shift, coefficients = _constants()
        bits.copy_(torch.add(shift, ratio.copy_(self.xyz.view(torch.int32)), alpha=1 / 3, out=ratio))
        torch.div(self.xyz, torch.pow(self.f, 3, out=ratio), out=ratio)
        factor = torch.add(coefficients[-2], ratio, alpha=_CUBE_ROOT[-1], out=self.xyz)
        for coefficient in coefficients[-3::-1]:
            torch.addcmul(coefficient, factor, ratio, out=factor)
        self.f.mul_(factor)


def _sum(values: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> Tensor:
    """The weighted sum, written to ``out``."""
    counting = [(value, weight) for value, weight in zip(values, weights, strict=True) if weight]
    if not counting:
        return out.zero_()
    torch.mul(*counting[0], out=out)
    for value, weight in counting[1:]:
        out.add_(value, alpha=weight)
    return out


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
