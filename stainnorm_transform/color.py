"""Color arithmetic: kornia's CIELAB, and shifts of a*, b*, computed straight in RGB."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stainnorm_transform import cie, strips
from stainnorm_transform.eager import eager_on_cpu, is_eager, is_wrapped
from stainnorm_transform.resources import safe_after_fork

with warnings.catch_warnings():
    # kornia makes TorchScript functions as it is imported, of which newer versions of torch warn.
    warnings.simplefilter("ignore", FutureWarning)
    from kornia.color import rgb_to_lab as _kornia_rgb_to_lab

# Tissue of L* = 10 to 60 takes the full offset, white glass from 97 none: between labs, the color of paler tissue
# differs the less, in proportion. Nor does black up to 5 take any, as padding and masks have it.
FULL_LIGHTNESS, WHITE_LIGHTNESS = (10.0, 60.0), 97.0
BLACK_LIGHTNESS = 5.0
# Between these factors L* keeps its order where white and black are preserved; they come from L* = 10 and 97.
LIGHTNESS_FACTORS = 2 / 3, 1 + 37 / 97

# A map gives an offset for every color, ``B z`` with B (2, 4) and z = (1, (L* - 60) / 20, (a* - 20) / 20,
# (b* + 12) / 20): its first column is the offset of a usual color of tissue, the others how it differs 20 units away.
MAP_CENTER, MAP_UNIT = (60.0, 20.0, -12.0), 20.0
# Slopes of a map are bounded: the Frobenius norm of those on a*, b* and the norm of those on L*, per Lab unit. Then no
# map folds colors or inverts a hue: at equal L*, what it does to the difference of two colors is to turn it by less
# than 37 degrees, asin(0.6), and to make it 0.4 to 1.6 times as large.
MAX_SLOPE = 0.6
# z of a map as weights of 1, f(X), f(Y) and f(Z), in which L*, a* and b* are linear.
_Z_OF_F = torch.tensor(
    [
        [1.0, 0.0, 0.0, 0.0],
        [(-16 - MAP_CENTER[0]) / MAP_UNIT, 0.0, 116 / MAP_UNIT, 0.0],
        [-MAP_CENTER[1] / MAP_UNIT, 500 / MAP_UNIT, -500 / MAP_UNIT, 0.0],
        [-MAP_CENTER[2] / MAP_UNIT, 0.0, 200 / MAP_UNIT, -200 / MAP_UNIT],
    ],
    dtype=torch.float64,
    device="cpu",
).tolist()
# Larger shifts, and factors of L*, are taken as this: nearly all colors are then at the border of the gamut.
_LARGEST = 1e4

# Colors of uint8 images.
TABLE_SIZE = 1 << 24

# On the CPU, images are looked up, and those of float64 shifted, in strips of about this many pixels, so that
# temporaries stay in cache.
_STRIP_PIXELS = 1 << 17
# On CUDA, so that temporaries stay small beside the images, and few enough kernels are started.
_CUDA_STRIP_PIXELS = 1 << 22


def shift_ab(image: Tensor, shift: Tensor, preserve_white: bool = True, lightness: Tensor | None = None) -> Tensor:
    """Adds an offset to a* and b* of sRGB images, or that of a map, and scales L*; the Lab image is never formed.

    L* is a function of relative luminance Y alone, so moving (a*, b*) at constant L* only moves f(X) by
    ``w * da / 500`` and f(Z) by ``-w * db / 200``. With ``preserve_white`` the offset fades out towards white glass
    and black by ``w = clamp(min((97 - L*) / 37, (L* - 5) / 5), 0, 1)``; otherwise ``w = 1``. Inside the sRGB gamut,
    shifting by an offset and then by its negative restores the image (by a map it does not, as the color has changed);
    outside it, RGB is clamped to [0, 1]. A shift of 0 changes nothing.

    A map gives each color an offset of its own: ``(da, db) = B z`` of ``z = (1, (L* - 60) / 20, (a* - 20) / 20,
    (b* + 12) / 20)``. So its first column is the offset of a usual color of tissue, and the others are by how much the
    offset grows for 20 units of L*, of a* and of b*. A map whose slopes are 0 is an offset.

    ``lightness`` multiplies L* by ``1 + w (lightness - 1)``, at constant a*, b*. With ``preserve_white``, factors from
    0.67 to 1.38 (LIGHTNESS_FACTORS) keep the order of L*, inside the gamut.

    Differentiable in ``image`` (floating point), ``shift`` and ``lightness``. On the CPU the result for an image does
    not depend, to the last bit, on the batch it is in; whether a gradient is recorded changes it by up to 2e-5.

    Args:
        image: sRGB, shape (..., 3, H, W), uint8 or floating point in [0, 1]. NaN pixels stay NaN.
        shift: an offset (da, db) in CIELAB units (D65, 2 degree observer), shape (2,), or a map B, shape (2, 4), in the
            same units; one for all images, or with the leading dimensions of ``image``: (..., 2) or (..., 2, 4).
        preserve_white: whether to fade the shift out from L* = 60 to 97, and from 10 to 5.
        lightness: factors of L*, 0 or more: shape () or the leading dimensions of ``image``. None is 1.

    Returns:
        sRGB of the shape, dtype, device and memory format of ``image``. float64 is computed in float64, every other
        dtype in float32.

    Raises:
        TypeError: ``image`` is neither uint8 nor floating point, or ``shift`` or ``lightness`` no tensor.
        ValueError: the shapes do not fit the rules above; on the CPU also, the shift or the lightness is not finite, or
            the lightness below 0.

    Example:
        >>> pink = torch.tensor([0.9, 0.6, 0.7]).view(3, 1, 1)
        >>> bluer = shift_ab(pink, torch.tensor([0.0, -10.0]))
        >>> [round(value, 2) for value in bluer.flatten().tolist()]
        [0.88, 0.6, 0.75]
    """
    check_image(image)
    for name, value in (("shift", shift), ("lightness", lightness)):
        if not isinstance(value, Tensor) and not (value is None and name == "lightness"):
            raise TypeError(f"expected {name} to be a tensor, got {type(value).__name__}")
    leading = image.shape[:-3]
    end = (2, 4) if shift.shape[-1:] == (4,) else (2,)
    # The lengths first: to compare a length of a batch, which may be a symbol, with 2 would fix it.
    if not any(shift.ndim == len(shape) and shift.shape == shape for shape in (end, (*leading, *end))):
        expected = f"(2,), (2, 4), {(*leading, 2)} or {(*leading, 2, 4)}" if leading else "(2,) or (2, 4)"
        raise ValueError(
            f"expected a shift of shape {expected} for an image of shape {tuple(image.shape)}, got {tuple(shift.shape)}"
        )
    if lightness is not None and lightness.shape not in ((), leading):
        raise ValueError(f"expected lightness of shape () or {tuple(leading)}, got {tuple(lightness.shape)}")

    given = [value for value in (shift, lightness) if value is not None]
    is_on_cpu = eager_on_cpu(image, *given)
    if is_on_cpu and not all(value.isfinite().all() for value in given):
        raise ValueError(
            f"expected a finite shift and lightness, got {', '.join(str(value.tolist()) for value in given)}"
        )
    if lightness is not None and eager_on_cpu(image, lightness) and (lightness < 0).any():
        raise ValueError(f"expected lightness of 0 or more, got {lightness.tolist()}")
    rows = [shift.to(image.device).clamp(-_LARGEST, _LARGEST).expand(*leading, *end)]
    if lightness is not None:
        rows.append(lightness.to(image.device).clamp(max=_LARGEST).expand(leading))
    tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (image, *rows))
    if is_on_cpu and not tracked:
        with safe_after_fork():
            return _on_cpu(image, preserve_white, *rows)
    if image.device.type == "cuda" and is_eager(image, *rows) and not tracked:
        return _on_cuda(image, preserve_white, *rows)
    moved = one_by_one(functools.partial(_at_once, preserve_white), image, *rows)
    # vmap cannot write to what it does not map.
    if moved.stride() == image.stride() or (not torch.compiler.is_compiling() and is_wrapped(image, *rows)):
        return moved
    return torch.empty_like(image).copy_(moved)


def _unmoved(image: Tensor, shift: Tensor, lightness: Tensor | None = None) -> Tensor:
    """Which images stay as they are: (..., 1, 1, 1)."""
    unmoved = (shift.flatten(image.ndim - 3) == 0).all(dim=-1)
    if lightness is not None:
        unmoved = unmoved & (lightness == 1)
    return unmoved[..., None, None, None]


def _on_cpu(image: Tensor, preserve_white: bool, *rows: Tensor) -> Tensor:
    out = torch.empty_like(image)
    for place in itertools.product(*map(range, image.shape[:-3])):
        here = [row[place] for row in rows]
        # As numbers, which take less time than small tensors.
        color_map = [row if isinstance(row, list) else [row, 0.0, 0.0, 0.0] for row in here[0].tolist()]
        lightness = here[1].item() if len(here) > 1 else None
        if lightness in (None, 1) and not any(map(any, color_map)):
            out[place] = image[place]
        elif image.dtype == torch.float64:
            for strip, target in strips.split(image[place], out[place], max(1, _STRIP_PIXELS // image.shape[-1])):
                target.copy_(shift_batch(strip, preserve_white, *here))
        else:
            strips.shift(image[place], out[place], _change(preserve_white, color_map, lightness))
    return out


def _change(preserve_white: bool, color_map: list[list[float]], lightness: float | None) -> strips.Change:
    """A map (2, 4), and a lightness, in the terms of ``strips``."""
    # L* moves all three alike.
    factor = 1.0 if lightness is None else lightness
    step = strips.Linear(f_y=factor - 1, constant=(1 - factor) * cie.F_BLACK)
    parts = []
    for row, divisor in zip(color_map, (500, -200), strict=True):
        one, x, y, z = (sum(map(operator.mul, row, column)) / divisor for column in zip(*_Z_OF_F, strict=True))
        parts.append(strips.Linear(f_x=x, f_y=y + step.f_y, f_z=z, constant=one + step.constant))
    to_x, to_z = parts
    to_y = None if lightness is None else step
    whole = strips.Linear(constant=1.0)
    if not preserve_white:
        return strips.Change(to_x, to_z, to_y, whole, whole)
    # As in ``fade``, of L* = 116 f(Y) - 16.
    white, black = WHITE_LIGHTNESS - FULL_LIGHTNESS[1], FULL_LIGHTNESS[0] - BLACK_LIGHTNESS
    below_white = strips.Linear(f_y=-116 / white, constant=(WHITE_LIGHTNESS + 16) / white)
    above_black = strips.Linear(f_y=116 / black, constant=-(BLACK_LIGHTNESS + 16) / black)
    return strips.Change(to_x, to_z, to_y, below_white, above_black)


def _on_cuda(image: Tensor, preserve_white: bool, *rows: Tensor) -> Tensor:
    """On CUDA: a strip of all images at a time, and no look at a value, which would wait for the device."""
    out = torch.empty_like(image)
    pixels = math.prod(image.shape[:-3]) * image.shape[-1]
    unmoved = _unmoved(image, *rows)
    for strip, target in strips.split(image, out, max(1, _CUDA_STRIP_PIXELS // max(1, pixels))):
        target.copy_(torch.where(unmoved, strip, shift_batch(strip, preserve_white, *rows)))
    return out


def _at_once(preserve_white: bool, image: Tensor, *rows: Tensor) -> Tensor:
    # NaN would reach the gradient of the shift, and by it every pixel.
    holes = image.isnan().any(dim=-3, keepdim=True)
    moved = shift_batch(torch.where(holes, 1, image), preserve_white, *rows)
    unmoved = _unmoved(image, *rows) | holes
    # The sum is the image, with the gradient of what moved.
    moved = torch.where(unmoved, torch.where(holes, 1, image).detach() + (moved - moved.detach()), moved)
    return torch.where(holes, torch.nan, moved).to(image.dtype) if image.is_floating_point() else moved


def color_terms(lab: Tensor) -> Tensor:
    """Z of a map for Lab images (..., 3, H, W): (..., 4, H, W)."""
    z = [(channel - center) / MAP_UNIT for channel, center in zip(lab.unbind(-3), MAP_CENTER, strict=True)]
    return torch.stack([torch.ones_like(z[0]), *z], dim=-3)


def bounded(slopes: Tensor) -> Tensor:
    """Slopes of a map (..., 2, 3), in its units, scaled down to norms of MAX_SLOPE where they are larger."""
    lightness, a, b = (slopes**2).sum(dim=-2, keepdim=True).unbind(-1)
    squares = torch.stack([lightness, a + b, a + b], dim=-1)
    limit = (MAX_SLOPE * MAP_UNIT) ** 2
    # Smooth, and exactly 1 for what is within the bound.
    return slopes * (limit / squares.clamp(min=limit)).sqrt()


def as_map(offset: Tensor) -> Tensor:
    """The map (..., 2, 4) that gives every color the same offset (..., 2)."""
    return torch.cat([offset[..., None], torch.zeros_like(offset)[..., None].expand(*offset.shape, 3)], dim=-1)


def rgb_to_lab(image: Tensor) -> Tensor:
    """CIELAB (D65, 2 degree observer) of floating point sRGB in [0, 1]: (..., 3, H, W) to the same shape.

    It is kornia's, whatever autocast says. L* is in [0, 100]; a* and b* are in about [-128, 127].
    """
    with without_autocast(image):
        if image.device.type == "cuda" and is_eager(image):
            with _ConstantsOnce():
                return _kornia_rgb_to_lab(image)
        return _kornia_rgb_to_lab(image)


def without_autocast(image: Tensor) -> contextlib.AbstractContextManager[object]:
    """The context in which nothing is computed in less than float32, on the device of ``image``."""
    kind = image.device.type
    return torch.autocast(kind, enabled=False) if kind != "meta" else contextlib.nullcontext()


class _ConstantsOnce(TorchFunctionMode):
    """Makes each constant once for a device: to copy it there in every call is to wait for the device every time."""

    _made: ClassVar[dict[tuple[str, str], Tensor]] = {}

    def __torch_function__(
        self, function: Callable[..., Tensor], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        if function is not torch.tensor:
            return function(*args, **(kwargs or {}))
        key = (repr(args), repr(kwargs))
        if key not in self._made:
            with torch.inference_mode(False):
                self._made[key] = function(*args, **(kwargs or {}))
        return self._made[key]


def shift_table(shift: Tensor, preserve_white: bool = True) -> Tensor:
    """What ``shift_ab`` makes of every uint8 color, by an offset (2,) or a map (2, 4): int32, shape (2**24,), 64 MiB.

    The entry for (R, G, B) is at R + 256 G + 65536 B, and is packed in the same way: as the bytes R, G, B, 0 lie in
    memory.
    """
    level = torch.arange(256, dtype=torch.uint8, device="cpu")
    green, red = torch.meshgrid(level, level, indexing="ij")
    table = torch.empty(256, TABLE_SIZE // 256, dtype=torch.int32, device="cpu")
    for blue, row in enumerate(table):
        colors = torch.stack([red, green, torch.full_like(red, blue)])
        _pack(shift_ab(colors, shift, preserve_white).flatten(1), row)
    return table.flatten()


def look_up(image: Tensor, table: Tensor) -> Tensor:
    """``shift_ab`` of uint8 images (..., 3, H, W) on the CPU by ``shift_table``: several times as fast.

    Equal, but for rare pixels that are rounded to the next level.
    """
    out = torch.empty_like(image)
    rows = min(max(1, _STRIP_PIXELS // image.shape[-1]), image.shape[-2])
    index = torch.empty(rows, image.shape[-1], dtype=torch.int32, device=image.device)
    colors = torch.empty_like(index)
    for place in itertools.product(*map(range, image.shape[:-3])):
        for strip, target in strips.split(image[place], out[place], rows):
            height = strip.shape[-2]
            _pack(strip, index[:height])
            packed = colors[:height]
            torch.index_select(table, 0, index[:height].view(-1), out=packed.view(-1))
            # The cast to uint8 keeps the lowest byte.
            target[0].copy_(packed)
            target[1].copy_(packed.bitwise_right_shift_(8))
            target[2].copy_(packed.bitwise_right_shift_(8))
    return out


def _pack(colors: Tensor, out: Tensor) -> None:
    """Writes R + 256 G + 65536 B of uint8 (3, ...) to ``out`` (...), int32."""
    out.copy_(colors[2])
    for channel in (colors[1], colors[0]):
        torch.add(channel, out, alpha=256, out=out)


def fade(lightness: Tensor) -> Tensor:
    """Share of a shift that a pixel of this L* takes, in [0, 1], where white and black are preserved."""
    below_white = (WHITE_LIGHTNESS - lightness) / (WHITE_LIGHTNESS - FULL_LIGHTNESS[1])
    above_black = (lightness - BLACK_LIGHTNESS) / (FULL_LIGHTNESS[0] - BLACK_LIGHTNESS)
    return torch.minimum(above_black, below_white).clamp(0, 1)


def random_offset(
    shape: Sequence[int], max_offset: float, generator: torch.Generator | None = None, channels: int = 2
) -> Tensor:
    """(da, db), or so many channels, uniform in [-max_offset, max_offset], independently: shape (*shape, channels)."""
    return (2 * torch.rand(*shape, channels, generator=generator, dtype=torch.float32) - 1) * max_offset


def random_slopes(shape: Sequence[int], slope: float, generator: torch.Generator | None = None) -> Tensor:
    """Random slopes of maps, (*shape, 2, 3): normal, those of a* on a* and b* on b* with the deviation ``slope``.

    The deviation of a* on b* and b* on a* is 2/3 of it, that on L* 5/6. Their norm is at most MAX_SLOPE.
    """
    normal = torch.randn(*shape, 2, 3, generator=generator, dtype=torch.float32)
    deviation = normal.new_tensor([[5 / 6, 1, 2 / 3], [5 / 6, 2 / 3, 1]]) * (slope * MAP_UNIT)
    return bounded(normal * deviation)


def random_factors(shape: Sequence[int], spread: float | Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Factors, log-uniform from exp(-spread) to exp(spread): shape ``shape``, to which that of ``spread`` extends."""
    return torch.exp((2 * torch.rand(tuple(shape), generator=generator, dtype=torch.float32) - 1) * spread)


def check_image(image: Tensor) -> None:
    """Raises TypeError or ValueError unless ``image`` is uint8 or floating point of shape (..., 3, H, W)."""
    if not isinstance(image, Tensor):
        raise TypeError(f"expected a tensor, got {type(image).__name__}")
    if image.dtype not in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"expected uint8 in [0, 255] or floating point in [0, 1], got {image.dtype}")
    if image.ndim < 3 or image.shape[-3] != 3 or 0 in image.shape[-2:]:
        hint = ": channels come first, permute it" if image.ndim >= 3 and image.shape[-1] == 3 else ""
        raise ValueError(f"expected an image of shape (..., 3, H, W) with H, W >= 1, got {tuple(image.shape)}{hint}")


def image_of(sample: Any) -> Any:
    """The image of a sample: the sample itself or, of a dict as ``SlideTiles`` yields it, what it has as ``image``.

    Raises:
        TypeError: a dict without an image.
    """
    if not isinstance(sample, Mapping):
        return sample
    if "image" not in sample:
        raise TypeError(f"expected a dict with an image under 'image', got the keys {', '.join(map(repr, sample))}")
    return sample["image"]


def one_by_one(function: Callable[..., Tensor], image: Tensor, *rows: Tensor) -> Tensor:
    """Applies a function of batches to images of any leading dimensions; in eager mode on the CPU to one at a time.

    There, a vectorized kernel may round an image differently at another place in a batch, and large temporaries
    leave the cache.

    Args:
        function: takes (N, 3, H, W) and for each of ``rows`` (N, ...), and returns (N, ...).
        image: shape (..., 3, H, W).
        rows: with the leading dimensions of ``image``.
    """
    leading = image.shape[:-3]
    count = math.prod(leading)
    batch = image.reshape(count, *image.shape[-3:])
    flat = [row.reshape(count, *row.shape[len(leading) :]) for row in rows]
    if eager_on_cpu(image, *rows) and count > 1:
        out = torch.cat([function(*(rows[i : i + 1] for rows in (batch, *flat))) for i in range(count)])
    else:
        out = function(batch, *flat)
    return out.reshape(*leading, *out.shape[1:])


def shift_batch(image: Tensor, preserve_white: bool, shift: Tensor, lightness: Tensor | None = None) -> Tensor:
    """``shift_ab`` of images (..., 3, H, W) by offsets (..., 2) or maps (..., 2, 4), unchecked and all at once."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    work = image.to(dtype)
    work = work / 255 if image.dtype == torch.uint8 else torch.clamp(work, 0, 1)
    linear = cie.decode(work)
    x, y, z = (_weighted(row, linear.unbind(-3)) for row in cie.M)
    f_x, f_y, f_z = cie.f(x), cie.f(y), cie.f(z)

    steps = [_of_color(terms, (f_x, f_y, f_z)) for terms in _terms(shift, dtype, image.device)]
    if lightness is not None:
        # L* moves all three alike.
        of_y = (f_y - cie.F_BLACK) * (lightness.to(image.device, dtype)[..., None, None] - 1)
        steps = [*(step + of_y for step in steps), of_y]
    if preserve_white:
        share = fade(116 * f_y - 16)
        steps = [share * step for step in steps]
    d_x = cie.f_inverse(f_x + steps[0]) - x
    # As in kornia and scikit-image, f(Z) stops at 0.
    d_z = cie.f_inverse(torch.clamp(f_z + steps[1], min=0)) - z
    d_y = None if lightness is None else cie.f_inverse(f_y + steps[2]) - y

    moved = []
    for row, channel in zip(cie.M_INV, linear.unbind(-3), strict=True):
        for weight, moved_by in zip(row, (d_x, d_y, d_z), strict=True):
            if moved_by is not None:
                channel = torch.add(channel, moved_by, alpha=weight)
        moved.append(channel)
    result = torch.clamp(cie.encode(torch.stack(moved, dim=-3)), 0, 1)
    if image.dtype == torch.uint8:
        result = torch.round(255 * result)
    return result.to(image.dtype)


def _terms(shift: Tensor, dtype: torch.dtype, device: torch.device) -> Iterator[Sequence[Tensor]]:
    """What a shift adds to f(X) and f(Z): a constant and, for a map, weights of f(X), f(Y) and f(Z), (..., 1, 1)."""
    shift = shift.to(device, dtype)
    if shift.shape[-1] == 2:
        columns = [shift]
    else:
        columns = [_weighted(weights, shift.unbind(-1)) for weights in zip(*_Z_OF_F, strict=True)]
    for channel, divisor in enumerate((500, -200)):
        yield [column[..., channel, None, None] / divisor for column in columns]


def _of_color(terms: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term, value in zip(terms[1:], values, strict=False):
        total = torch.addcmul(total, value, term)
    return total


def _weighted(weights: Sequence[float], channels: Sequence[Tensor]) -> Tensor:
    total = channels[0] * weights[0]
    for weight, channel in zip(weights[1:], channels[1:], strict=True):
        total = torch.add(total, channel, alpha=weight)
    return total
