"""NormalizeStain and PerturbStain, as torchvision v2 transforms."""

from __future__ import annotations

import json
import math
import numbers
import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import PIL.Image
import torch
import torch.fx
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from stainnorm_transform import weights as weights_files
from stainnorm_transform.color import (
    LIGHTNESS_FACTORS,
    MAP_CENTER,
    MAP_UNIT,
    TABLE_SIZE,
    as_map,
    check_image,
    image_of,
    look_up,
    random_offset,
    shift_ab,
    shift_table,
)
from stainnorm_transform.eager import eager_on_cpu, is_eager, untracked
from stainnorm_transform.estimate import map_of, mean_terms, offset_of, tissue_sums
from stainnorm_transform.network import ColorNormNet, FrozenColorNormNet
from stainnorm_transform.resources import safe_after_fork

# The last tables of all colors, 64 MiB each: the transforms of a process share them.
_TABLES = 2
_tables: dict[tuple[float, ...], Tensor] = {}
# Threads make a table once; several at a time would compete for memory.
_making_a_table = threading.Lock()

# What PerturbStain draws at most, in Lab units: a* and b* of sRGB go no farther.
_LARGEST_OFFSET = 128

# What of a NormalizeStain is no tensor, and what kind.
_EXTRA: dict[str, type] = {"preserve_white": bool, "slopes": bool, "target": str, "recipe": str}

_LIBRARIES = ("stainnorm_transform", "torch", "torchvision")
_NO_TORCHSCRIPT = (
    "TorchScript is not supported, nor the ONNX exporter that is built on it: use torch.export.export, or "
    "torch.onnx.export(..., dynamo=True)"
)


class _ImageTransform(v2.Transform):
    """Transforms the images of a sample, of whatever kind, and passes everything else through."""

    _transformed_types = (
        PIL.Image.Image,
        tv_tensors.Image,
        tv_tensors.Video,
        lambda inpt: isinstance(inpt, Tensor) and not isinstance(inpt, tv_tensors.TVTensor),
    )

    def forward(self, image: Any, *more: Any) -> Any:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise RuntimeError(_NO_TORCHSCRIPT)
        if isinstance(image, torch.fx.Proxy):
            # A leaf, like the layers of torch: what is done depends on the image.
            module = image.tracer.path_of_module(self)  # type: ignore[attr-defined]
            if not module:
                raise TypeError(f"{type(self).__name__} is a leaf for torch.fx: trace the model that it is in")
            return image.tracer.create_proxy("call_module", module, (image, *more), {})
        with safe_after_fork():
            return super().forward(image, *more)

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(_NO_TORCHSCRIPT)

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        if not any(self._needs_transform_list(flat_inputs)):
            kinds = ", ".join(sorted({type(inpt).__name__ for inpt in flat_inputs})) or "nothing"
            hint = ": torch.from_numpy(image).permute(2, 0, 1) is one" if "ndarray" in kinds else ""
            raise TypeError(f"expected a PIL image or an image tensor in the sample, got {kinds}{hint}")


class NormalizeStain(_ImageTransform):
    """Makes H&E images look like the target's: estimates how far the colors of each are shifted, and takes that away.

    For PIL images (RGB), uint8 tensors, floating point tensors in [0, 1], ``tv_tensors.Image`` and ``Video``, of shape
    (..., 3, H, W), alone or in nested samples, whose masks and boxes (as tv_tensors) and labels pass through. The
    output has the kind, dtype, shape, device and memory format of the input. L* stays where the shifted color exists
    in sRGB. An image without tissue comes back unchanged, unless a map is fixed, and with ``preserve_white`` so do
    white glass and black.

    The shift is one color map for an image: an offset in a*, b* that depends on the color alone, see ``shift_ab``.
    Every image has its own, unless ``for_slide``, ``with_map`` or ``with_offset`` fixes one for all. Then, from 2**24
    pixels on, uint8 images on the CPU go through a table of all colors: the same result but for rare rounding, several
    times as fast, for some tenths of a second and 64 MiB in each process, which keeps the last two tables.

    The network is a frozen copy, float32, all buffers, no parameters and no layers: training, unfreezing, initializing,
    pruning, ``half`` and autocast of the model around it do not change it. Gradients reach the input. All that
    decides the output is in the ``state_dict``.

    Args:
        network: a trained ColorNormNet, which is copied.
        preserve_white: as the network was trained, see ``shift_ab``.
        slopes: True for a network that was trained with a slope; False gives each image one offset.
        target: name of the target, for ``repr``.
        recipe: how the network was trained, for ``repr``.
        fixed_map: the map (2, 4) to take away from every image instead of an estimate.

    Raises:
        TypeError: on a call, if the sample holds no image, or one that is neither uint8 nor floating point.
        ValueError: on a call, if an image is not of shape (..., 3, H, W), or a PIL image not of mode RGB.

    Example:
        >>> normalize = NormalizeStain.pretrained()
        >>> normalize(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 3, 64, 64])
    """

    fixed_map: Tensor | None

    # Tensors made in inference mode could not pass gradients later.
    @torch.inference_mode(False)
    def __init__(
        self,
        network: ColorNormNet | FrozenColorNormNet,
        preserve_white: bool = True,
        *,
        slopes: bool = True,
        target: str = "unnamed",
        recipe: str = "",
        fixed_map: Tensor | None = None,
    ) -> None:
        super().__init__()
        if type(network) not in (ColorNormNet, FrozenColorNormNet):
            hint = ": pretrained() takes a name or a path" if isinstance(network, str | os.PathLike) else ""
            raise TypeError(f"expected a ColorNormNet, and no other class, got {type(network).__name__}{hint}")
        if fixed_map is not None:
            fixed_map = _checked(fixed_map, "map", (2, 4)).detach().clone().float().to(network.device)
        self.network = FrozenColorNormNet(network)
        self.preserve_white = preserve_white
        self.slopes = slopes
        self.target = target
        self.recipe = recipe
        self.register_buffer("fixed_map", fixed_map)
        self._pixels = 0
        self.eval()

    @classmethod
    def pretrained(cls, weights: str | os.PathLike[str] = weights_files.DEFAULT) -> NormalizeStain:
        """Builds the transform from shipped weights, by name, or from a ``.safetensors`` file, by path.

        Raises:
            ValueError: the name is unknown or the file is damaged.
            FileNotFoundError: there is no such file.
        """
        loaded = weights_files.load(weights)
        recipe = ", ".join(f"{key}={value}" for key, value in loaded.config.items() if key != "preserve_white")
        return cls(
            loaded.network,
            loaded.config["preserve_white"],
            slopes=loaded.config["slope"] > 0,
            target=loaded.target,
            recipe=recipe,
        )

    def estimate_map(self, images: Tensor | PIL.Image.Image, dense: bool = False) -> Tensor:
        """The color maps that normalizing takes away, see ``shift_ab``: (..., 2, 4) for images (..., 3, H, W).

        Args:
            images: as for a call.
            dense: whether the fit is to every pixel, rather than to those of a small copy. It costs up to 256 times as
                much, for a difference that is seldom seen.
        """
        with safe_after_fork():
            return self._map_of(_to_tensor(images), dense)

    def estimate_offset(self, images: Tensor | PIL.Image.Image, dense: bool = False) -> Tensor:
        """What normalizing takes away from the mean color of the tissue: (0, a*, b*) in Lab units, (..., 3).

        With a fixed map, what that takes away from the mean color of the tissue or, without tissue, from L* = 60,
        a* = 20, b* = -12. Arguments as for ``estimate_map``.
        """
        with safe_after_fork():
            image = _to_tensor(images)
            sums = tissue_sums(self.network, image, self.preserve_white, dense)
            if self.fixed_map is None:
                offset = offset_of(sums)
            else:
                offset = (self.fixed_map * mean_terms(sums)[..., None, :]).sum(dim=-1)
            return torch.nn.functional.pad(offset, (1, 0))

    def _map_of(self, image: Tensor, dense: bool = False) -> Tensor:
        if self.fixed_map is not None:
            return self.fixed_map.repeat(*image.shape[:-3], 1, 1)

        def estimate() -> Tensor:
            return map_of(tissue_sums(self.network, image, self.preserve_white, dense), self.slopes)

        # What hooks are given may be used with gradients.
        if self.network._forward_hooks or self.network._forward_pre_hooks:
            return estimate()
        return untracked(estimate, image, *self.network.buffers())

    @torch.no_grad()
    def for_slide(self, tiles: Any) -> NormalizeStain:
        """A new transform with one fixed map for all tiles of a slide, so that no seams appear between them.

        Args:
            tiles: images of the slide, of any sizes: a batch, a list, batches from a data loader, or a ``SlideTiles``
                that does not normalize; also dicts with them as ``image``, as that yields. A few dozen do.

        Returns:
            A NormalizeStain that takes away the map that fits the tissue of all tiles, or nothing where none has
            tissue.

        Raises:
            TypeError: something else than images, such as (image, label) pairs.
            ValueError: there are no tiles.
        """
        if isinstance(tiles, str | os.PathLike):
            raise TypeError("expected tiles, got a path: SlideTiles(path, None) are the tiles of a slide")
        tiles = image_of(tiles)
        if isinstance(tiles, PIL.Image.Image) or (isinstance(tiles, Tensor) and tiles.ndim == 3):
            raise TypeError("expected a batch or a list of tiles, got one image: put it in a list")
        total = torch.zeros(6, 4, dtype=torch.float32, device=self.network.device)
        seen = 0
        for sample in tiles:
            tile = image_of(sample)
            if not isinstance(tile, Tensor | PIL.Image.Image):
                raise TypeError(f"expected tiles that are images or batches of images, got {type(tile).__name__}")
            image = _to_tensor(tile)
            pixels = image.shape[-2] * image.shape[-1]
            with safe_after_fork():
                total += pixels * tissue_sums(self.network, image, self.preserve_white).reshape(-1, 6, 4).sum(dim=0)
            seen += math.prod(image.shape[:-3])
        if not seen:
            raise ValueError("expected at least one tile, got none")
        return self.with_map(map_of(total, self.slopes))

    def with_map(self, color_map: Tensor) -> NormalizeStain:
        """A new transform to the same target that takes this map (2, 4) away from every image.

        That is ``shift_ab(image, -color_map)``.

        Raises:
            TypeError: it is no tensor.
            ValueError: it has another shape, or is not finite.
        """
        return NormalizeStain(
            self.network,
            self.preserve_white,
            slopes=self.slopes,
            target=self.target,
            recipe=self.recipe,
            fixed_map=color_map,
        )

    def with_offset(self, offset: Tensor) -> NormalizeStain:
        """A new transform to the same target that takes this offset away from every image: (L*, a*, b*), Lab units.

        L* is not used. Raises as ``with_map`` does.
        """
        return self.with_map(as_map(_checked(offset, "offset", (3,))[1:]))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return _like(inpt, self._normalize)

    def _normalize(self, image: Tensor) -> Tensor:
        if image.dtype == torch.uint8 and self.fixed_map is not None and eager_on_cpu(image, self.fixed_map):
            table = self.table_for(image.numel() // 3)
            if table is not None:
                return look_up(image, table)
        return shift_ab(image, -self._map_of(image), self.preserve_white)

    def table_for(self, pixels: int) -> Tensor | None:
        """The ``shift_table`` of a fixed map, shared by the process: made once as many pixels came as it has entries.

        Args:
            pixels: how many come now.

        Returns:
            The table, or None as long as it does not pay, or another thread makes one.
        """
        if self.fixed_map is None:
            return None
        key = (*self.fixed_map.flatten().tolist(), self.preserve_white)
        table = _tables.get(key)
        if table is None:
            self._pixels += pixels
            # Nobody waits: meanwhile images are shifted without it, and a fork may have copied the lock as it was held.
            if self._pixels >= TABLE_SIZE and _making_a_table.acquire(blocking=False):
                try:
                    table = _tables.get(key)
                    if table is None:
                        table = shift_table(-self.fixed_map.cpu(), self.preserve_white)
                        while len(_tables) >= _TABLES:
                            del _tables[next(iter(_tables))]
                        _tables[key] = table
                    self._pixels = 0
                finally:
                    _making_a_table.release()
        return table

    def get_extra_state(self) -> Tensor:
        """What is no tensor, as the bytes of JSON, so that formats without pickle can hold it."""
        extra = {name: getattr(self, name) for name in _EXTRA}
        return torch.tensor(list(json.dumps(extra).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Takes what ``get_extra_state`` returned.

        Raises:
            RuntimeError: it is something else.
        """
        if state.is_meta:
            return
        try:
            # Averages of states are floating point.
            extra = json.loads(bytes(state.to(torch.uint8).tolist()))
            values = {name: kind(extra[name]) for name, kind in _EXTRA.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise RuntimeError("the _extra_state in the state is not that of a NormalizeStain") from error
        for name, value in values.items():
            setattr(self, name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}network.stem.weight" in state_dict:
            # States of version 0.1.0, which had offsets only, do not say more.
            if (offset := state_dict.pop(f"{prefix}offset", None)) is not None:
                state_dict[f"{prefix}fixed_map"] = as_map(offset[1:])
            self.slopes = False
            state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        # Whether a map is fixed is part of the state.
        if any(name.startswith(f"{prefix}network.") for name in state_dict):
            fixed = f"{prefix}fixed_map" in state_dict
            self.fixed_map = torch.zeros(2, 4, dtype=torch.float32, device=self.network.device) if fixed else None
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.fixed_map is not None:
            self.fixed_map = self.fixed_map.detach().float()

    def train(self, mode: bool = True) -> NormalizeStain:
        """Stays in eval mode, whatever ``mode``."""
        super().train(False)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NormalizeStain:
        # model.half() and the like move the network to another device but leave it in float32, and in its layout.
        def keep_kind(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            # As a vector first: a kernel of one pixel passes for contiguous in any layout.
            return moved if moved.stride() == tensor.stride() else moved.contiguous().view(-1).view(tensor.shape)

        super()._apply(keep_kind, recurse)
        return self

    def __repr__(self) -> str:
        parts = [f"target={self.target!r}", f"preserve_white={self.preserve_white}"]
        if self.fixed_map is not None:
            rows = (", ".join(f"{value:.2f}" for value in row) for row in self.fixed_map.tolist())
            parts.append(f"fixed_map=[{', '.join(f'[{row}]' for row in rows)}]")
        if self.recipe:
            parts.append(f"recipe={self.recipe!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


class PerturbStain(_ImageTransform):
    """Changes the colors of images at random, as stains and scanners do: augmentation, so that a model fits new labs.

    L*, a* and b* of tissue of L* = 60 move independently, each by up to ``max_offset``. Darker tissue moves less, in
    proportion to its L*, so nuclei keep their hue better than stroma. Lighter tissue moves less as well: the offset
    fades out towards white, see ``shift_ab``. Takes and returns what NormalizeStain does. Each image of a batch has its
    own change; the frames of a ``Video`` and images of equal leading shape within one sample share theirs. Draws from
    torch's global generator.

    Args:
        max_offset: offsets are uniform in [-max_offset, max_offset], in Lab units, from 0 to 128; that of L* stops at
            -20 and 22.9, so that what is lighter stays lighter.
        preserve_white: whether white glass and black keep their color, see ``shift_ab``.

    Raises:
        TypeError: ``max_offset`` is no number, or ``preserve_white`` no bool.
        ValueError: ``max_offset`` is not from 0 to 128.

    Example:
        >>> PerturbStain()(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(self, max_offset: float = 25.0, preserve_white: bool = True) -> None:
        super().__init__()
        if isinstance(max_offset, bool) or not isinstance(max_offset, numbers.Real):
            raise TypeError(f"expected a number for max_offset, got {type(max_offset).__name__}")
        if not 0 <= max_offset <= _LARGEST_OFFSET:
            raise ValueError(f"expected a max_offset from 0 to {_LARGEST_OFFSET} Lab units, got {max_offset}")
        if not isinstance(preserve_white, bool):
            raise TypeError(f"expected True or False for preserve_white, got {preserve_white!r}")
        self.max_offset: float = float(max_offset)
        self.preserve_white: bool = preserve_white

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        shapes = dict.fromkeys(_leading_shape(inpt) for inpt in flat_inputs)
        return {"changes": {shape: self._change(shape) for shape in shapes}}

    def _change(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """A map (*shape, 2, 4) and factors of L* (*shape)."""
        offset = random_offset(shape, self.max_offset, channels=3)
        color = offset[..., 1:]
        none = torch.zeros_like(color)
        color_map = torch.stack([color, color * (MAP_UNIT / MAP_CENTER[0]), none, none], dim=-1)
        return color_map, (1 + offset[..., 0] / MAP_CENTER[0]).clamp(*LIGHTNESS_FACTORS)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        shift, lightness = params["changes"][_leading_shape(inpt)]
        return _like(inpt, lambda image: shift_ab(image, shift, self.preserve_white, lightness))


def _checked(value: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(value).__name__}")
    if value.shape != shape:
        hint = ": one fits all images, so take one row, or for_slide" if value.shape[1:] == shape else ""
        raise ValueError(f"expected one {name} of shape {shape}, got {tuple(value.shape)}{hint}")
    if is_eager(value) and not value.isfinite().all():
        raise ValueError(f"expected a finite {name}, got {value.tolist()}")
    return value


def _leading_shape(inpt: Any) -> torch.Size:
    """The leading shape of the changes that an input takes."""
    if isinstance(inpt, PIL.Image.Image | tv_tensors.Video):
        return torch.Size()
    check_image(inpt)
    return inpt.shape[:-3]


def _to_tensor(inpt: Tensor | PIL.Image.Image) -> Tensor:
    if isinstance(inpt, PIL.Image.Image):
        if inpt.mode != "RGB":
            raise ValueError(
                f"expected a PIL image of mode RGB, got {inpt.mode}: convert it first (a mask: to tv_tensors.Mask)"
            )
        return pil_to_tensor(inpt)
    check_image(inpt)
    image = inpt.as_subclass(Tensor) if _is_dressed(inpt) else inpt
    if image.is_floating_point() and eager_on_cpu(image):
        _warn_of_range(image.detach())
    return image


def _warn_of_range(image: Tensor) -> None:
    """Warns of images that can't be in [0, 1], by some of their pixels; bicubic filters leave it by a little."""
    some = image[..., ::8, ::8]
    if not some.numel():
        return
    low, high = (float(value) for value in some.aminmax())
    # Of a pale image in [-1, 1], few values are far below 0, but more than a filter makes.
    negative = low < -0.02 and float((some < -0.02).float().mean()) > 0.05
    # The texts do not depend on the image, so that each is shown once.
    for is_odd, what, remedy in (
        (2 < high < math.inf, "above 2", "divide by 255"),
        (-math.inf < low < -0.25 or negative, "below 0", "normalize stains before v2.Normalize"),
    ):
        if is_odd:
            warnings.warn(
                f"expected floating point images in [0, 1], got values {what}, which are cut to it: {remedy}",
                stacklevel=_callers_level(),
            )


def _callers_level() -> int:
    """The ``stacklevel`` by which a warning of the calling function names the first line outside of ``_LIBRARIES``."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level


def _is_dressed(inpt: Tensor) -> bool:
    """Whether a tensor is of a subclass that adds to it, as tv_tensors and MONAI's do, not one of other memory."""
    return type(inpt) is not Tensor and type(inpt).__torch_dispatch__ is Tensor.__torch_dispatch__


def _like(inpt: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Applies a function of tensors and returns the kind of the input, with what it carries."""
    out = function(_to_tensor(inpt))
    if isinstance(inpt, PIL.Image.Image):
        image = to_pil_image(out)
        image.info.update(inpt.info)
        return image
    if isinstance(inpt, tv_tensors.TVTensor):
        return tv_tensors.wrap(out, like=inpt)
    return torch.empty_like(inpt).copy_(out) if _is_dressed(inpt) else out
