"""Shifts of images on the CPU: the arithmetic of ``color.shift_ab`` in few passes over strips that stay in cache."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from stainnorm_transform import cie

# Temporaries of a strip take 60 bytes a pixel: they stay in cache, and are few enough calls.
_STRIP_PIXELS = 1 << 16

# X, Z and Y lie in this order, so that what moves at constant L* lies together.
_ORDER = (0, 2, 1)
# f(Y) of L* = 0.
_F_BLACK = 16 / 116

# The bits of a float, over 3, plus this are about those of its cube root y: for r = x / y**3 in [0.84, 1], the cube
# root is then y times this polynomial in r, to 1e-8. Twice as fast as by logarithm.
_CUBE_ROOT_BITS = 710_240_000
_CUBE_ROOT = (0.43982919, 0.95871573, -0.62635874, 0.28392294, -0.05610914)

# Linear light in so many bins that each has the border of one level at most.
_BINS = 4096


def shift(image: Tensor, out: Tensor, weights: Tensor, darker: bool) -> None:
    """Writes to ``out`` what becomes of an image (3, H, W): uint8 or floating point, computed in float32.

    Args:
        image: sRGB, as for ``color.shift_ab``, in any layout.
        out: of its shape and dtype, in any layout.
        weights: finite, shape (5, 4). Its columns weigh f(X), f(Z), f(Y) and 1 for what is added, in this order, to
            f(X), to f(Z), and to f(Y), and for how far a pixel is from white and from black, in shares of a shift.
        darker: whether something is added to f(Y).
    """
    height, width = image.shape[-2:]
    rows = min(max(1, _STRIP_PIXELS // width), height)
    work = _Strip(rows * width)
    for source, target in zip(torch.split(image, rows, dim=-2), torch.split(out, rows, dim=-2), strict=True):
        if source.shape[-2] != rows:
            work = _Strip(source.shape[-2] * width)
        if image.dtype == torch.uint8:
            work.decode_levels(source)
            work.move(weights, darker, _matrices(_BINS))
            target.copy_(work.encode_levels().view(source.shape))
        else:
            work.decode(source)
            work.move(weights, darker, _matrices(1))
            target.copy_(work.encode().view(source.shape))


class _Strip:
    """The memory of a strip of so many pixels, and what is done in it."""

    def __init__(self, pixels: int) -> None:
        self.index = torch.empty(pixels, dtype=torch.int64, device="cpu")
        self.linear = torch.empty(3, pixels, dtype=torch.float32, device="cpu")
        self.xyz = torch.empty_like(self.linear)
        self.f_and_one = torch.ones(4, pixels, dtype=torch.float32, device="cpu")
        self.f = self.f_and_one[:3]
        self.terms = torch.empty(5, pixels, dtype=torch.float32, device="cpu")

    def decode_levels(self, image: Tensor) -> None:
        levels, _ = _tables()
        self._look_up(levels, self.xyz.view(torch.int32).view(image.shape).copy_(image), self.linear)

    def decode(self, image: Tensor) -> None:
        self.xyz.view(image.shape).copy_(image).clamp_(0, 1)
        cie.decode(self.xyz, out=self.linear, spare=self.xyz)

    def move(self, weights: Tensor, darker: bool, matrices: tuple[Tensor, Tensor]) -> None:
        """Moves ``linear``, which is not clamped."""
        to_xyz, from_xyz = matrices
        torch.mm(to_xyz, self.linear, out=self.xyz)
        dark = not float(self.xyz.amin()) >= cie.EPSILON
        if dark:
            below = torch.clamp(self.xyz - cie.EPSILON, max=0)
            self.xyz.clamp_(min=cie.EPSILON)
        self._cube_root()
        if dark:
            self.f.add_(below, alpha=cie.KAPPA / 116)

        torch.mm(weights, self.f_and_one, out=self.terms)
        below_white, above_black = self.terms[3], self.terms[4].clamp_(0, 1)
        share = torch.minimum(below_white, above_black, out=below_white).clamp_(min=0)
        self.terms[:2].mul_(share)
        if darker:
            step, f_y = self.terms[2], self.f[2]
            step.mul_(above_black).add_(f_y).clamp_(min=_F_BLACK).sub_(f_y)
            self.terms[:2].add_(step)
        moving = 3 if darker else 2
        f, moved, spare = self.f[:moving], self.terms[:moving], self.xyz[:moving]
        moved.add_(f)
        # As in kornia and scikit-image, f(Z) stops at 0.
        moved[1].clamp_(min=0)
        if dark or not float(moved.amin()) >= cie.F_KNEE:
            moved = cie.f_inverse(moved).sub_(cie.f_inverse(f))
        else:
            # Of the same f, so that its error hardly shows in the difference.
            torch.pow(moved, 3, out=moved).sub_(torch.pow(f, 3, out=spare))
        self.linear.addmm_(from_xyz[:, :moving], moved)

    def _cube_root(self) -> None:
        """Of ``xyz``, which is lost, to ``f``."""
        ratio, bits = self.terms[:3], self.f.view(torch.int32)
        shift, coefficients = _constants()
        bits.copy_(torch.add(shift, ratio.copy_(self.xyz.view(torch.int32)), alpha=1 / 3, out=ratio))
        torch.div(self.xyz, torch.pow(self.f, 3, out=ratio), out=ratio)
        factor = torch.add(coefficients[-2], ratio, alpha=_CUBE_ROOT[-1], out=self.xyz)
        for coefficient in coefficients[-3::-1]:
            torch.addcmul(coefficient, factor, ratio, out=factor)
        self.f.mul_(factor)

    def encode_levels(self) -> Tensor:
        _, steps = _tables()
        bins = self.terms[:3].view(torch.int32).copy_(self.linear.clamp_(0, _BINS))
        self._look_up(steps, bins, self.xyz)
        # From float to uint8 at once is slower.
        return bins.copy_(self.xyz.add_(self.linear))

    def _look_up(self, table: Tensor, index: Tensor, out: Tensor) -> None:
        # By int32, which is faster to make of other numbers than int64 is; but int64 is faster to look up.
        for of_channel, channel in zip(index, out, strict=True):
            torch.index_select(table, 0, self.index.copy_(of_channel.view(-1)), out=channel)

    def encode(self) -> Tensor:
        return cie.encode(self.linear, out=self.xyz, spare=self.linear).clamp_(0, 1)


@functools.cache
def _matrices(white: float) -> tuple[Tensor, Tensor]:
    """Linear light, of which white has this much, to X, Z and Y, and back."""
    to_xyz = torch.tensor(cie.M, dtype=torch.float64, device="cpu")[_ORDER, :] / white
    from_xyz = torch.tensor(cie.M_INV, dtype=torch.float64, device="cpu")[:, _ORDER] * white
    return to_xyz.float(), from_xyz.float()


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
