"""CIELAB and sRGB as published: matrices, curves, and their inverses.

A curve with ``out`` writes there, and with ``spare`` has memory for a step: tensors of its argument's shape, of which
``spare`` may be the argument itself. Fresh memory costs more than the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Linear sRGB -> CIE XYZ (ITU-R BT.709 primaries) and the D65 white point, rounded as in kornia and scikit-image: an
# offset estimated in their Lab is then exactly that offset here. White as the row sums differs by up to 2e-4 in RGB.
_RGB_TO_XYZ = torch.tensor(
    [
        [0.412453, 0.357580, 0.180423],
        [0.212671, 0.715160, 0.072169],
        [0.019334, 0.119193, 0.950227],
    ],
    dtype=torch.float64,
    device="cpu",
)
_WHITE = torch.tensor([0.95047, 1.0, 1.08883], dtype=torch.float64, device="cpu")
_TO_RELATIVE_XYZ = _RGB_TO_XYZ / _WHITE[:, None]
# Linear sRGB -> X, Y, Z, of which white has 1, and back.
M = _TO_RELATIVE_XYZ.tolist()
M_INV = torch.linalg.inv(_TO_RELATIVE_XYZ).tolist()

# CIE 15:2004: L* = 116 f(Y) - 16, a* = 500 (f(X) - f(Y)), b* = 200 (f(Y) - f(Z)); f is a cube root above EPSILON and
# the line (KAPPA t + 16) / 116 below it. The exact fractions make both pieces meet.
EPSILON = 216 / 24389
KAPPA = 24389 / 27
F_KNEE = 6 / 29
# f(Y) of L* = 0.
F_BLACK = 16 / 116

# IEC 61966-2-1. The knee of its inverse is rounded there; computed, both are each other's inverse exactly.
SRGB_KNEE = 0.04045
LINEAR_KNEE = ((SRGB_KNEE + 0.055) / 1.055) ** 2.4


def decode(value: Tensor, out: Tensor | None = None, spare: Tensor | None = None) -> Tensor:
    """Linear light of sRGB, both in [0, 1]."""

    def curve(v: Tensor) -> Tensor:
        return _power(torch.mul(torch.add(v, 0.055, out=out), 1 / 1.055, out=out), 2.4, out)

    return _above(value, SRGB_KNEE, curve, 1 / 12.92, out, spare)


def encode(value: Tensor, out: Tensor | None = None, spare: Tensor | None = None) -> Tensor:
    """The sRGB of linear light, both in [0, 1]."""

    def curve(v: Tensor) -> Tensor:
        return torch.sub(torch.mul(_power(v, 1 / 2.4, out), 1.055, out=out), 0.055, out=out)

    return _above(value, LINEAR_KNEE, curve, 12.92, out, spare)


def f(value: Tensor) -> Tensor:
    """CIELAB's f of X, Y or Z relative to white."""
    return _above(value, EPSILON, lambda v: _power(v, 1 / 3), KAPPA / 116)


def f_inverse(value: Tensor) -> Tensor:
    """X, Y or Z relative to white, of their f."""
    return _above(value, F_KNEE, lambda v: torch.pow(v, 3), 116 / KAPPA)


def _above(
    value: Tensor,
    knee: float,
    curve: Callable[[Tensor], Tensor],
    slope: float,
    out: Tensor | None = None,
    spare: Tensor | None = None,
) -> Tensor:
    """``curve`` above the knee, and below it the line of this slope that meets it there. Gradients are finite."""
    if out is not None and bool(value.amin() >= knee):
        return curve(value)
    clamped = torch.clamp(value, min=knee, out=out)
    below = torch.sub(value, clamped, out=spare)
    return torch.add(curve(clamped), below, alpha=slope, out=out)


def _power(value: Tensor, exponent: float, out: Tensor | None = None) -> Tensor:
    # Several times as fast as pow on the CPU, and exp2 several times as fast as exp.
    return torch.exp2(torch.mul(torch.log(value, out=out), exponent / math.log(2), out=out), out=out)
