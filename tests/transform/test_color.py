from pathlib import Path

import numpy as np
import pytest
import skimage.color
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia.color import lab_to_rgb, rgb_to_lab

from stainnorm_transform import color, strips
from stainnorm_transform.color import (
    MAP_UNIT,
    MAX_SLOPE,
    as_map,
    bounded,
    color_terms,
    look_up,
    random_factors,
    random_offset,
    random_slopes,
    shift_ab,
    shift_batch,
    shift_table,
)

OFFSETS = [(50, 50), (-50, 50), (50, -50), (-50, -50), (50, 0), (0, -50), (12.5, -24.2), (0.5, 0.25)]
BOTH = pytest.mark.parametrize("preserve_white", [True, False])
SEEDS = st.integers(0, 10**6)


def rgb_cube(steps: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Every combination of ``steps`` levels of red, green and blue: (3, steps, steps ** 2)."""
    level = torch.linspace(0, 1, steps, dtype=dtype)
    return torch.stack(torch.meshgrid(level, level, level, indexing="ij")).reshape(3, steps, -1)


def fade(lab, preserve_white: bool):
    lightness = lab[..., :1, :, :]
    return ((97 - lightness) / 37).clip(0, 1) * ((lightness - 5) / 5).clip(0, 1) if preserve_white else 1


def any_map(seed: int, *, offset: float = 15.0) -> torch.Tensor:
    """A map (2, 4), float64, with slopes of any size within the bound."""
    generator = torch.Generator().manual_seed(seed)
    color_map = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    for columns in (slice(1, 2), slice(2, 4)):
        size = MAX_SLOPE * MAP_UNIT * torch.rand((), dtype=torch.float64, generator=generator)
        color_map[:, columns] *= size / color_map[:, columns].norm()
    color_map[:, 0] *= offset
    return color_map


def any_maps(count: int) -> torch.Tensor:
    return torch.stack([any_map(seed) for seed in range(count)]).float()


def changed_lab(lab: torch.Tensor, color_map: torch.Tensor, preserve_white: bool, factor: float = 1.0):
    """What ``shift_ab`` says it does, in Lab: (3, H, W)."""
    lightness, a, b = lab
    z = torch.stack([torch.ones_like(a), (lightness - 60) / 20, (a - 20) / 20, (b + 12) / 20])
    distance = fade(lab, preserve_white) * torch.einsum("ij,jyx->iyx", color_map.to(lab.dtype), z)
    lighter = lab[:1] * (1 + fade(lab, preserve_white) * (factor - 1))
    return torch.cat([lighter, lab[1:] + distance])


def inside_the_gamut(image: torch.Tensor) -> torch.Tensor:
    return ((image > 1e-6) & (image < 1 - 1e-6)).all(dim=0)


@BOTH
@pytest.mark.parametrize("offset", OFFSETS)
def test_agrees_with_kornia_over_the_cube(offset, preserve_white):
    image = rgb_cube(52)
    lab = rgb_to_lab(image)
    expected = lab_to_rgb(lab + fade(lab, preserve_white) * torch.tensor([0.0, *offset]).view(3, 1, 1))
    out = shift_ab(image, torch.tensor(offset, dtype=torch.float32), preserve_white)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)
    assert out.min() >= 0
    assert out.max() <= 1


@BOTH
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.filterwarnings("ignore:Conversion from CIE-LAB")
def test_agrees_with_scikit_image_over_the_cube(offset, preserve_white):
    image = rgb_cube(32, torch.float64)
    lab = skimage.color.rgb2lab(image.numpy(), channel_axis=0)
    lab[1:] += fade(lab, preserve_white) * np.array(offset)[:, None, None]
    expected = skimage.color.lab2rgb(lab, channel_axis=0)
    out = shift_ab(image, torch.tensor(offset, dtype=torch.float64), preserve_white)
    # scikit-image rounds the knee of f to four digits.
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-4)


@BOTH
@pytest.mark.parametrize("lightness", [None, 0.6, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_map_agrees_with_kornia_over_the_cube(dtype, lightness, preserve_white):
    image = rgb_cube(32, dtype)
    factor = None if lightness is None else torch.tensor(lightness, dtype=dtype)
    for seed in range(6):
        color_map = any_map(seed)
        expected = lab_to_rgb(changed_lab(rgb_to_lab(image), color_map, preserve_white, lightness or 1.0))
        out = shift_ab(image, color_map.to(dtype), preserve_white, factor)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


@BOTH
@given(seed=SEEDS, lightness=st.floats(0.5, 2))
@settings(max_examples=10, deadline=None)
@pytest.mark.filterwarnings("ignore:Conversion from CIE-LAB")
def test_a_map_agrees_with_scikit_image_over_the_cube(preserve_white, seed, lightness):
    image, color_map = rgb_cube(16, torch.float64), any_map(seed, offset=40.0)
    lab = torch.from_numpy(skimage.color.rgb2lab(image.numpy(), channel_axis=0))
    changed = changed_lab(lab, color_map, preserve_white, lightness)
    expected = skimage.color.lab2rgb(changed.numpy(), channel_axis=0)
    out = shift_ab(image, color_map, preserve_white, torch.tensor(lightness, dtype=torch.float64))
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-4)


@BOTH
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [(12.5, -24.2), (0.0, 30.0)])
def test_a_map_without_slopes_is_its_offset_to_the_last_bit(offset, dtype, preserve_white):
    cube = rgb_cube(16)
    image = (255 * cube).to(dtype) if dtype == torch.uint8 else cube.to(dtype)
    offset = torch.tensor(offset)
    assert as_map(offset).shape == (2, 4)
    for lightness in (None, torch.tensor(0.8)):
        for gradient in (False, True):
            shifts = [shift.clone().requires_grad_(gradient) for shift in (offset, as_map(offset))]
            assert torch.equal(*(shift_ab(image, shift, preserve_white, lightness) for shift in shifts))


@BOTH
@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_lightness_is_multiplied_and_color_stays_inside_the_gamut(preserve_white, seed):
    image = rgb_cube(12, torch.float64)
    factor = 0.5 + 1.5 * torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    out = shift_ab(image, torch.zeros(2), preserve_white, factor)
    before, after = rgb_to_lab(image), rgb_to_lab(out)
    inside = inside_the_gamut(out)
    assert inside.float().mean() > 0.1
    lighter = before[:1] * (1 + fade(before, preserve_white) * (factor - 1))
    torch.testing.assert_close(after[:1, inside], lighter[:, inside], atol=1e-3, rtol=0)
    torch.testing.assert_close(after[1:, inside], before[1:, inside], atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(2,), (2, 4)])
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_shift_is_the_identity(dtype, preserve_white, shape):
    image = rgb_cube(52, dtype)
    zero = torch.zeros(shape, dtype=dtype)
    for lightness in (None, torch.ones(())):
        assert torch.equal(shift_ab(image, zero, preserve_white, lightness), image)
        assert torch.equal(shift_ab(image.clone().requires_grad_(), zero, preserve_white, lightness), image)
    levels = (255 * image).to(torch.uint8)
    assert torch.equal(shift_ab(levels, zero, preserve_white, torch.ones(())), levels)
    out = shift_ab(image, torch.full(shape, 1e-14, dtype=dtype), preserve_white)
    torch.testing.assert_close(out, image, atol=1e-5 if dtype == torch.float32 else 1e-13, rtol=0)


def test_zero_offset_returns_every_uint8_color():
    level = torch.arange(256, dtype=torch.uint8)
    for red in range(0, 256, 15):
        green, blue = torch.meshgrid(level, level, indexing="ij")
        image = torch.stack([torch.full_like(green, red), green, blue])
        assert torch.equal(shift_ab(image, torch.full((2,), 1e-9)), image)
        assert torch.equal(shift_ab(image, torch.full((2, 4), 1e-9), True, torch.tensor(1 + 1e-7)), image)


@BOTH
@given(da=st.floats(-50, 50), db=st.floats(-50, 50), seed=st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_shift_and_back_is_the_identity_inside_the_gamut(preserve_white, da, db, seed):
    image = torch.rand(3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    offset = torch.tensor([da, db], dtype=torch.float64)
    shifted = shift_ab(image, offset, preserve_white)
    inside = inside_the_gamut(shifted)
    back = shift_ab(shifted, -offset, preserve_white)
    torch.testing.assert_close(back[:, inside], image[:, inside], atol=1e-9, rtol=0)


@given(seed=SEEDS, lightness=st.floats(0.5, 2))
@settings(max_examples=20, deadline=None)
def test_a_map_and_its_inverse_are_the_identity_inside_the_gamut(seed, lightness):
    """Where nothing fades: then z of the shifted color is that of the color times a matrix."""
    image = torch.rand(3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    color_map, factor = any_map(seed), torch.tensor(lightness, dtype=torch.float64)
    step = torch.eye(4, dtype=torch.float64)
    step[1] = torch.tensor([60 * (lightness - 1) / 20, lightness, 0.0, 0.0], dtype=torch.float64)
    step[2:] += color_map / 20
    shifted = shift_ab(image, color_map, False, factor)
    inside = inside_the_gamut(shifted)
    back = shift_ab(shifted, -color_map @ step.inverse(), False, 1 / factor)
    torch.testing.assert_close(back[:, inside], image[:, inside], atol=1e-9, rtol=0)


@pytest.mark.parametrize(("factor", "keeps_order"), [(0.66, False), (0.67, True), (1.38, True), (1.39, False)])
def test_up_to_some_factor_what_is_lighter_stays_lighter(factor, keeps_order):
    gray = torch.linspace(0, 1, 1 << 16, dtype=torch.float64).expand(3, 1, 1 << 16)
    changed = shift_ab(gray, torch.zeros(2), True, torch.tensor(factor, dtype=torch.float64))
    assert (changed.diff(dim=-1) > -1e-9).all() == keeps_order


@BOTH
@given(da=st.floats(-50, 50), db=st.floats(-50, 50), seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_lightness_stays_inside_the_gamut(preserve_white, da, db, seed):
    image = rgb_cube(12, torch.float64)
    for shift in (torch.tensor([da, db], dtype=torch.float64), any_map(seed)):
        shifted = shift_ab(image, shift, preserve_white)
        inside = inside_the_gamut(shifted)
        torch.testing.assert_close(rgb_to_lab(shifted)[0][inside], rgb_to_lab(image)[0][inside], atol=1e-3, rtol=0)


@BOTH
@given(seed=SEEDS, lightness=st.floats(30, 80))
@settings(max_examples=12, deadline=None)
@pytest.mark.filterwarnings("ignore:Conversion from CIE-LAB")
def test_no_map_within_the_bound_folds_colors_or_inverts_a_hue(preserve_white, seed, lightness):
    """Small circles around colors of one L*, of which a map makes ellipses around about the same colors."""
    slopes = bounded(100 * torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    z = torch.tensor([(lightness - 60) / 20, 0.0, 0.0], dtype=torch.float64)
    color_map = torch.cat([-(slopes @ z)[:, None], slopes], dim=1)
    angle = torch.arange(0, 2 * torch.pi, torch.pi / 8, dtype=torch.float64)
    circle = torch.stack([torch.zeros_like(angle), angle.cos(), angle.sin()])
    centers = torch.cartesian_prod(*(torch.tensor([-4.0, 0.0, 4.0], dtype=torch.float64) + c for c in (20, -12)))
    centers = torch.cat([torch.full((len(centers), 1), lightness, dtype=torch.float64), centers], dim=1).T
    around = centers[..., None] + 0.01 * circle[:, None]
    both = []
    for lab in (around, centers[..., None]):
        image = torch.from_numpy(skimage.color.lab2rgb(lab.numpy(), channel_axis=0))
        shifted = shift_ab(image, color_map, preserve_white)
        assert inside_the_gamut(image).all()
        assert inside_the_gamut(shifted).all()
        both.append(torch.from_numpy(skimage.color.rgb2lab(shifted.numpy(), channel_axis=0)))
    moved = torch.view_as_complex(((both[0] - both[1]) / 0.01)[1:].movedim(0, -1).contiguous())
    turn = moved / torch.view_as_complex(circle[1:].T.contiguous())
    assert turn.abs().min() > 1 - MAX_SLOPE - 1e-3
    assert turn.abs().max() < 1 + MAX_SLOPE + 1e-3
    assert turn.angle().abs().max() < np.arcsin(MAX_SLOPE) + 1e-3
    # Around each ellipse in the sense of the circle: the determinant of the change is positive.
    assert (moved.roll(-1, dims=-1) / moved).angle().min() > 0


@given(seed=SEEDS, size=st.floats(0.01, 1000))
@settings(max_examples=30, deadline=None)
def test_slopes_are_bounded_by_scaling_what_is_above(seed, size):
    slopes = size * torch.randn(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for before, after in zip(slopes, bounded(slopes), strict=True):
        for columns in (slice(0, 1), slice(1, 3)):
            norm = np.linalg.norm(before[:, columns].numpy())
            scale = min(1.0, MAX_SLOPE * MAP_UNIT / norm)
            torch.testing.assert_close(after[:, columns], scale * before[:, columns], rtol=1e-12, atol=0)
            assert scale < 1 or torch.equal(after[:, columns], before[:, columns])


def test_terms_of_a_color_are_its_distance_from_a_usual_one():
    lab = torch.tensor([[60.0, 20.0, -12.0], [80.0, 20.0, -12.0], [60.0, 40.0, -12.0], [60.0, 20.0, -32.0]])
    expected = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, -1]])
    assert torch.equal(color_terms(lab.T.reshape(1, 3, 1, 4)), expected.T.reshape(1, 4, 1, 4))


@pytest.mark.parametrize("level", [0, 1, 16])
def test_black_is_preserved(level):
    """As padding, corners of turned images, and masks have it; L* = 4.7 is the lightest."""
    black = torch.full((3, 4, 4), level, dtype=torch.uint8)
    for shift in (torch.tensor([-12.5, 24.2]), torch.tensor([40.0, 40.0]), any_map(0), any_map(1)):
        for lightness in (None, torch.tensor(0.6), torch.tensor(1.5)):
            assert torch.equal(shift_ab(black, shift, True, lightness), black)
        assert not torch.equal(shift_ab(black, shift, preserve_white=False), black)
    lighter = shift_ab(black / 255, torch.zeros(2), False, torch.tensor(1.5))
    before, after = (rgb_to_lab(image)[0] for image in (black / 255, lighter))
    torch.testing.assert_close(after, 1.5 * before, atol=1e-2, rtol=0)


def test_white_is_preserved_and_without_it_tinted():
    white = torch.ones(3, 1, 1)
    offset = torch.tensor([-12.5, 24.2])
    for lightness in (None, torch.tensor(0.6), torch.tensor(1.5)):
        for shift in (offset, any_map(0)):
            torch.testing.assert_close(shift_ab(white, shift, True, lightness), white, atol=1e-6, rtol=0)
            levels = torch.full((3, 2, 2), 255, dtype=torch.uint8)
            assert torch.equal(shift_ab(levels, shift, True, lightness), levels)
    # Subtracting (12.5, -24.2) turns white to (249, 255, 207).
    assert (255 * shift_ab(white, offset, preserve_white=False)).round().flatten().tolist() == [249, 255, 207]


@BOTH
def test_gradients_are_right_and_finite(preserve_white):
    image = (0.1 + 0.8 * torch.rand(2, 3, 3, 3, dtype=torch.float64)).requires_grad_()
    offset = torch.tensor([[3.0, -4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda i, o: shift_ab(i, o, preserve_white), (image, offset))
    maps = torch.stack([any_map(0, offset=4), torch.zeros(2, 4, dtype=torch.float64)]).requires_grad_()
    lightness = torch.tensor([1.2, 1.0], dtype=torch.float64, requires_grad=True)
    small = image.detach()[..., :2].requires_grad_()
    assert torch.autograd.gradcheck(lambda i, o, d: shift_ab(i, o, preserve_white, d), (small, maps, lightness))
    corners = torch.tensor([0.0, 1.0, 0.04045, 0.0031308])
    image = torch.cartesian_prod(corners, corners, corners).T.reshape(3, 8, 8).requires_grad_()
    for values in ([0.0, 0.0], [50.0, 50.0], [-50.0, -50.0]):
        offset = torch.tensor(values, requires_grad=True)
        for gradient in torch.autograd.grad(shift_ab(image, offset, preserve_white).sum(), (image, offset)):
            assert gradient.isfinite().all()
    for size in (0, 1, 10):
        color_map = (size * any_map(1).float()).requires_grad_()
        for factor in (0.5, 1.0, 2.0):
            inputs = image, color_map, torch.tensor(factor, requires_grad=True)
            for gradient in torch.autograd.grad(shift_ab(*inputs[:2], preserve_white, inputs[2]).sum(), inputs):
                assert gradient.isfinite().all()


def test_uint8_is_the_rounded_float_result(tile):
    for shift, lightness in ((torch.tensor([8.0, -5.0]), None), (any_map(2).float(), torch.tensor(1.2))):
        expected = (shift_ab(tile.double() / 255, shift.double(), True, lightness) * 255).round()
        difference = shift_ab(tile, shift, True, lightness).double() - expected
        assert difference.abs().max() <= 1
        assert (difference != 0).float().mean() < 1e-3


def resident(name: str) -> int:
    """Bytes of this process in memory: VmRSS, or the peak VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def every_color() -> torch.Tensor:
    """All uint8 colors: (3, 4096, 4096)."""
    number = torch.arange(1 << 24, dtype=torch.int32).view(4096, 4096)
    return torch.stack([number >> 16, number >> 8, number]).to(torch.uint8)


@pytest.mark.parametrize(("offset", "preserve_white"), [((-12.5, 24.2), True), ((30.0, -30.0), False)])
def test_every_uint8_color_is_the_rounded_float64_result(offset, preserve_white):
    colors, offset = every_color(), torch.tensor(offset)
    shifted = shift_ab(colors, offset, preserve_white)
    assert torch.equal(look_up(colors, shift_table(offset, preserve_white)), shifted)
    wrong = 0
    for strip, result in zip(colors.split(256, dim=1), shifted.split(256, dim=1), strict=True):
        exact = shift_ab(strip.double() / 255, offset.double(), preserve_white)
        difference = (result.int() - (exact * 255).round().int()).abs()
        assert difference.max() <= 1
        wrong += int(difference.any(dim=0).sum())
    assert wrong <= 1e-4 * (1 << 24)


@BOTH
def test_a_map_of_uint8_colors_is_the_rounded_float64_result(preserve_white):
    level = torch.arange(0, 256, 5, dtype=torch.uint8)
    colors = torch.stack(torch.meshgrid(level, level, level, indexing="ij")).reshape(3, len(level), -1)
    for seed, lightness in ((0, None), (1, torch.tensor(0.8)), (2, torch.tensor(1.3))):
        color_map = any_map(seed).float()
        exact = shift_ab(colors.double() / 255, color_map.double(), preserve_white, lightness)
        difference = (shift_ab(colors, color_map, preserve_white, lightness).int() - (exact * 255).round().int()).abs()
        assert difference.max() <= 1
        assert difference.any(dim=0).double().mean() <= 1e-4


def test_looking_up_is_shifting_for_any_layout():
    shift = any_map(3).float()
    table = shift_table(shift)
    images = torch.randint(0, 256, (2, 2, 3, 37, 53), dtype=torch.uint8)
    for image in (images, images[0, 0], images[:, 0].to(memory_format=torch.channels_last), images[..., ::2, ::3]):
        assert torch.equal(look_up(image, table), shift_ab(image, shift))
    image = images[0].to(memory_format=torch.channels_last)
    assert look_up(image, table).is_contiguous(memory_format=torch.channels_last)


def test_in_strips_and_at_once_the_result_is_the_same():
    image = torch.rand(3, 50, 60)
    image[:, :5] = 0
    for shift, lightness in ((torch.tensor([9.0, -20.0]), None), (any_map(0).float(), torch.tensor(0.7))):
        expected = shift_ab(image, shift, True, lightness)
        with_gradient = shift_ab(image.clone().requires_grad_(), shift, True, lightness)
        torch.testing.assert_close(with_gradient.detach(), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(shift_batch(image, True, shift, lightness), expected, atol=1e-5, rtol=0)


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="needs torch 2.9")
def test_without_matrix_products_the_result_is_the_same(monkeypatch, tile):
    """Where users let torch compute these in less than float32."""
    shifts = [(torch.tensor([9.0, -20.0]), None), (any_map(0).float(), None), (any_map(1).float(), torch.tensor(0.7))]
    expected = [
        [shift_ab(image, *given) for image in (tile, tile / 255)] for given in ((s, True, d) for s, d in shifts)
    ]
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.set_float32_matmul_precision("medium")
        assert not strips._is_exact()
        monkeypatch.setattr(torch.Tensor, "addmm_", None)
        for (shift, lightness), (levels, values) in zip(shifts, expected, strict=True):
            difference = (shift_ab(tile, shift, True, lightness).int() - levels.int()).abs()
            assert difference.max() <= 1
            assert difference.float().mean() < 1e-3
            torch.testing.assert_close(shift_ab(tile / 255, shift, True, lightness), values, atol=1e-5, rtol=0)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert strips._is_exact()


def test_what_runs_on_cuda_is_the_same(monkeypatch):
    monkeypatch.setattr(color, "_CUDA_STRIP_PIXELS", 700)
    images = torch.rand(2, 3, 3, 40, 50)
    images[0, 1, :, 5, 6] = torch.nan
    offsets = torch.tensor([[9.0, -20.0], [0.0, 0.0], [-30.0, 4.0]]).expand(2, 3, 2)
    maps = torch.stack([any_map(0), torch.zeros(2, 4), any_map(1)]).float().expand(2, 3, 2, 4)
    lightness = torch.tensor([1.2, 1.0, 0.7]).expand(2, 3)
    for rows in ((offsets,), (maps,), (maps, lightness)):
        for place in ((), (0,), (0, 2)):
            batch, here = images[place], [row[place] for row in rows]
            for image in (batch, batch.transpose(-3, -1).contiguous().transpose(-3, -1)):
                shift, *factor = here
                out, expected = color._on_cuda(image, True, *here), shift_ab(image, shift, True, *factor)
                torch.testing.assert_close(out, expected, atol=1e-5, rtol=0, equal_nan=True)
                assert out.stride() == expected.stride()
    levels = (255 * torch.rand(2, 3, 40, 50)).to(torch.uint8)
    for shift in (offsets[0, :2], maps[0, :2]):
        difference = (color._on_cuda(levels, True, shift).int() - shift_ab(levels, shift).int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 1e-3


def test_constants_are_made_once():
    image, made = torch.rand(3, 8, 8), []
    for _ in range(2):
        with color._ConstantsOnce():
            lab = rgb_to_lab(image)
            made.append(torch.tensor([1.0, 2.0], device="cpu"))
        assert torch.equal(lab, rgb_to_lab(image))
    assert made[0] is made[1]
    assert torch.tensor([1.0, 2.0], device="cpu") is not made[0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
def test_a_shift_that_is_no_number_is_refused(dtype):
    image = torch.ones(3, 4, 4, dtype=dtype)
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="expected a finite shift"):
            shift_ab(image, torch.tensor([0.0, value]))
        with pytest.raises(ValueError, match="finite shift and lightness"):
            shift_ab(image, torch.ones(2), lightness=torch.tensor(value))
    with pytest.raises(ValueError, match=r"lightness of 0 or more, got -0\.1"):
        shift_ab(image, torch.ones(2), lightness=torch.tensor(-0.1))


@pytest.mark.parametrize(("lightness", "level"), [(0.0, 0.0), (1e9, 1.0)])
def test_the_least_and_the_largest_lightness_are_black_and_white(lightness, level):
    image = torch.full((3, 2, 2), 0.5)
    for kind in (image, (255 * image).to(torch.uint8)):
        changed = shift_ab(kind, torch.zeros(2), True, torch.tensor(lightness))
        torch.testing.assert_close(changed / (1 if kind.is_floating_point() else 255), torch.full((3, 2, 2), level))


@pytest.mark.parametrize("size", [1e4, 1e9, 1e30])
def test_a_huge_shift_ends_at_the_border_of_the_gamut(size):
    image = torch.full((3, 2, 2), 0.6)
    for shift in (torch.tensor([size, 0.0]), size * torch.eye(2, 4)[[1, 0]]):
        for kind in (image, (255 * image).to(torch.uint8)):
            shifted = shift_ab(kind, shift) / (1 if kind.is_floating_point() else 255)
            assert ((shifted == 0) | (shifted == 1)).all()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_memory_is_at_most_twice_that_of_the_image(dtype):
    image = torch.zeros(3, 4096, 4096, dtype=dtype).add_(1 if dtype == torch.uint8 else 0.5)
    shift, lightness = any_map(0).float(), torch.tensor(0.9)
    shift_ab(image[:, :64], shift, True, lightness)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    out = shift_ab(image, shift, True, lightness)
    assert resident("VmHWM") - before < 2 * image.nbytes + 20e6
    assert out.shape == image.shape


def test_lab_agrees_with_kornia_and_scikit_image():
    image = rgb_cube(32, torch.float64)
    torch.testing.assert_close(color.rgb_to_lab(image), rgb_to_lab(image), atol=1e-3, rtol=0)
    expected = skimage.color.rgb2lab(image.numpy(), channel_axis=0)
    np.testing.assert_allclose(color.rgb_to_lab(image).numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("size", [(97, 63), (600, 401), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_batch_equals_its_images_to_the_last_bit(size, dtype, gradient, layout):
    images = torch.rand(5, 3, *size)
    images = ((images * 255) if dtype == torch.uint8 else images).to(dtype).to(memory_format=layout)
    offsets = random_offset((5,), 30.0).requires_grad_(gradient)
    single = [shift_ab(image, offset) for image, offset in zip(images, offsets, strict=True)]
    assert torch.equal(shift_ab(images, offsets), torch.stack(single))


@BOTH
@pytest.mark.parametrize("size", [(97, 63), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_batch_with_maps_and_lightness_equals_its_images_to_the_last_bit(size, dtype, gradient, preserve_white):
    images = torch.rand(2, 3, 3, *size)
    images = ((images * 255) if dtype == torch.uint8 else images).to(dtype)
    maps = any_maps(6).view(2, 3, 2, 4).requires_grad_(gradient)
    lightness = torch.tensor([[0.7, 1.0, 1.3], [1.0, 0.9, 1.1]])
    out = shift_ab(images, maps, preserve_white, lightness)
    for row in range(2):
        for column in range(3):
            place = row, column
            assert torch.equal(out[place], shift_ab(images[place], maps[place], preserve_white, lightness[place]))
    one = shift_ab(images, maps[0, 0], preserve_white, lightness[0, 0])
    assert torch.equal(one[1, 1], shift_ab(images[1, 1], maps[0, 0], preserve_white, lightness[0, 0]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keeps_shape_dtype_and_memory_format(dtype):
    for shape in ((3, 4, 5), (2, 3, 4, 5), (2, 2, 3, 4, 5), (0, 3, 4, 5)):
        image = torch.zeros(shape, dtype=dtype)
        out = shift_ab(image, torch.ones(2))
        assert (out.shape, out.dtype) == (image.shape, dtype)
    image = torch.zeros(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)
    assert shift_ab(image, torch.ones(2)).is_contiguous(memory_format=torch.channels_last)


def test_nan_stays_where_it_is():
    image = torch.full((3, 2, 2), 0.5)
    image[:, 0, 0] = torch.nan
    image[1, 1, 1] = torch.nan
    for shift in (torch.tensor([5.0, 5.0]), any_map(0)):
        shift, lightness = shift.float().requires_grad_(), torch.tensor(1.2, requires_grad=True)
        tracked = image.clone().requires_grad_()
        untracked = shift_ab(image, shift.detach()), shift_ab(image, shift.detach(), True, lightness.detach())
        for out in (*untracked, shift_ab(tracked, shift), shift_ab(tracked, shift, True, lightness)):
            assert out[:, 0, 0].isnan().all()
            assert out[:, 1, 1].isnan().all()
            assert out.isnan().sum() == 6
        out[~out.isnan()].sum().backward()
        for tensor in (tracked, shift, lightness):
            assert tensor.grad.isfinite().all()
        assert shift.grad.ne(0).all()
        assert lightness.grad != 0


@pytest.mark.parametrize(
    ("image", "offset", "error", "message"),
    [
        (torch.zeros(4, 4), torch.zeros(2), ValueError, r"shape \(\.\.\., 3, H, W\).*got \(4, 4\)"),
        (torch.zeros(1, 4, 4), torch.zeros(2), ValueError, r"got \(1, 4, 4\)"),
        (torch.zeros(3, 0, 4), torch.zeros(2), ValueError, r"H, W >= 1, got \(3, 0, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), torch.zeros(2), TypeError, "uint8 .* or floating point.*int32"),
        (torch.zeros(3, 4, 4, dtype=torch.bool), torch.zeros(2), TypeError, "bool"),
        (np.zeros((3, 4, 4)), torch.zeros(2), TypeError, "expected a tensor, got ndarray"),
        (
            torch.zeros(2, 3, 4, 4),
            torch.zeros(3),
            ValueError,
            r"shift of shape \(2,\), \(2, 4\), \(2, 2\) or \(2, 2, 4\) .* \(2, 3, 4, 4\), got \(3,\)",
        ),
        (torch.zeros(2, 3, 4, 4), torch.zeros(3, 2), ValueError, r"got \(3, 2\)"),
        (torch.zeros(3, 4, 4), torch.zeros(1, 2), ValueError, r"shift of shape \(2,\) or \(2, 4\) for .*got \(1, 2\)"),
        (torch.zeros(3, 4, 4), torch.zeros(4), ValueError, r"got \(4,\)"),
        (torch.zeros(3, 4, 4), torch.zeros(2, 3), ValueError, r"got \(2, 3\)"),
        (torch.zeros(3, 4, 4), torch.zeros(4, 2), ValueError, r"got \(4, 2\)"),
        (torch.zeros(3, 4, 4), torch.zeros(()), ValueError, r"got \(\)"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(3, 2, 4), ValueError, r"got \(3, 2, 4\)"),
        (torch.zeros(5, 2, 3, 4, 4), torch.zeros(5, 2, 4), ValueError, r"got \(5, 2, 4\)"),
    ],
)
def test_bad_input(image, offset, error, message):
    with pytest.raises(error, match=message):
        shift_ab(image, offset)


@pytest.mark.parametrize(
    ("image", "shape", "message"),
    [
        (torch.zeros(3, 4, 4), (1,), r"lightness of shape \(\) or \(\), got \(1,\)"),
        (torch.zeros(2, 3, 4, 4), (3,), r"lightness of shape \(\) or \(2,\), got \(3,\)"),
        (torch.zeros(2, 3, 4, 4), (2, 1), r"got \(2, 1\)"),
    ],
)
def test_lightness_of_a_wrong_shape(image, shape, message):
    with pytest.raises(ValueError, match=message):
        shift_ab(image, torch.zeros(2), True, torch.ones(shape))


def test_random_offset_is_uniform_and_independent():
    offset = random_offset((20000,), 30.0, torch.Generator().manual_seed(0))
    assert offset.abs().max() <= 30
    torch.testing.assert_close(offset.std(dim=0), torch.full((2,), 30 / 3**0.5), atol=0.3, rtol=0)
    assert offset.T.corrcoef()[0, 1].abs() < 0.03


def test_random_slopes_have_the_deviations_that_are_said_and_are_bounded():
    slopes = random_slopes((20000,), 0.1, torch.Generator().manual_seed(0)) / MAP_UNIT
    assert slopes.shape == (20000, 2, 3)
    expected = torch.tensor([[0.1 * 5 / 6, 0.1, 0.1 * 2 / 3], [0.1 * 5 / 6, 0.1 * 2 / 3, 0.1]])
    torch.testing.assert_close(slopes.std(dim=0), expected, rtol=0.03, atol=0)
    assert slopes.mean(dim=0).abs().max() < 0.003
    assert (slopes.flatten(1).T.corrcoef() - torch.eye(6)).abs().max() < 0.03
    large = random_slopes((5, 4), 3.0, torch.Generator().manual_seed(0)) / MAP_UNIT
    assert large.shape == (5, 4, 2, 3)
    assert large[..., 1:].flatten(2).norm(dim=2).max() <= MAX_SLOPE * (1 + 1e-6)
    assert large[..., 0].norm(dim=2).max() <= MAX_SLOPE * (1 + 1e-6)
    assert random_slopes((), 0.0).eq(0).all()


def test_random_factors_are_log_uniform():
    factors = random_factors((20000,), 0.3, torch.Generator().manual_seed(0)).log()
    assert factors.abs().max() <= 0.3 + 1e-6
    torch.testing.assert_close(factors.std(), torch.tensor(0.3 / 3**0.5), atol=3e-3, rtol=0)
    assert factors.mean().abs() < 3e-3
    assert random_factors((), 0.3).shape == ()
    assert random_factors((2, 3), 0.0).eq(1).all()
