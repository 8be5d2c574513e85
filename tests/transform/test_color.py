from pathlib import Path

import numpy as np
import pytest
import skimage.color
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia.color import lab_to_rgb, rgb_to_lab

from stainnorm_transform import color
from stainnorm_transform.color import look_up, random_offset, shift_ab, shift_batch, shift_table

OFFSETS = [(50, 50), (-50, 50), (50, -50), (-50, -50), (50, 0), (0, -50), (12.5, -24.2), (0.5, 0.25)]
BOTH = pytest.mark.parametrize("preserve_white", [True, False])


def rgb_cube(steps: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Every combination of ``steps`` levels of red, green and blue: (3, steps, steps ** 2)."""
    level = torch.linspace(0, 1, steps, dtype=dtype)
    return torch.stack(torch.meshgrid(level, level, level, indexing="ij")).reshape(3, steps, -1)


def fade(lab, preserve_white: bool):
    lightness = lab[..., :1, :, :]
    return ((97 - lightness) / 37).clip(0, 1) * ((lightness - 5) / 5).clip(0, 1) if preserve_white else 1


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_offset_is_the_identity(dtype, preserve_white):
    image = rgb_cube(52, dtype)
    zero = torch.zeros(2, dtype=dtype)
    assert torch.equal(shift_ab(image, zero, preserve_white), image)
    assert torch.equal(shift_ab(image.clone().requires_grad_(), zero, preserve_white), image)
    out = shift_ab(image, torch.full((2,), 1e-14, dtype=dtype), preserve_white)
    torch.testing.assert_close(out, image, atol=1e-5 if dtype == torch.float32 else 1e-13, rtol=0)


def test_zero_offset_returns_every_uint8_color():
    level = torch.arange(256, dtype=torch.uint8)
    for red in range(0, 256, 15):
        green, blue = torch.meshgrid(level, level, indexing="ij")
        image = torch.stack([torch.full_like(green, red), green, blue])
        assert torch.equal(shift_ab(image, torch.full((2,), 1e-9)), image)


@BOTH
@given(da=st.floats(-50, 50), db=st.floats(-50, 50), seed=st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_shift_and_back_is_the_identity_inside_the_gamut(preserve_white, da, db, seed):
    image = torch.rand(3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    offset = torch.tensor([da, db], dtype=torch.float64)
    shifted = shift_ab(image, offset, preserve_white)
    inside = ((shifted > 1e-6) & (shifted < 1 - 1e-6)).all(dim=0)
    back = shift_ab(shifted, -offset, preserve_white)
    torch.testing.assert_close(back[:, inside], image[:, inside], atol=1e-9, rtol=0)


@BOTH
@given(da=st.floats(-50, 50), db=st.floats(-50, 50))
@settings(max_examples=20, deadline=None)
def test_lightness_stays_inside_the_gamut(preserve_white, da, db):
    image = rgb_cube(12, torch.float64)
    shifted = shift_ab(image, torch.tensor([da, db], dtype=torch.float64), preserve_white)
    inside = ((shifted > 1e-6) & (shifted < 1 - 1e-6)).all(dim=0)
    torch.testing.assert_close(rgb_to_lab(shifted)[0][inside], rgb_to_lab(image)[0][inside], atol=1e-3, rtol=0)


@pytest.mark.parametrize("level", [0, 1, 16])
def test_black_is_preserved(level):
    """As padding, corners of turned images, and masks have it; L* = 4.7 is the lightest."""
    black = torch.full((3, 4, 4), level, dtype=torch.uint8)
    for offset in (torch.tensor([-12.5, 24.2]), torch.tensor([40.0, 40.0])):
        assert torch.equal(shift_ab(black, offset), black)
        assert not torch.equal(shift_ab(black, offset, preserve_white=False), black)


def test_white_is_preserved_and_without_it_tinted():
    white = torch.ones(3, 1, 1)
    offset = torch.tensor([-12.5, 24.2])
    torch.testing.assert_close(shift_ab(white, offset), white, atol=1e-6, rtol=0)
    # Subtracting (12.5, -24.2) turns white to (249, 255, 207).
    assert (255 * shift_ab(white, offset, preserve_white=False)).round().flatten().tolist() == [249, 255, 207]


@BOTH
def test_gradients_are_right_and_finite(preserve_white):
    image = (0.1 + 0.8 * torch.rand(2, 3, 3, 3, dtype=torch.float64)).requires_grad_()
    offset = torch.tensor([[3.0, -4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda i, o: shift_ab(i, o, preserve_white), (image, offset))
    corners = torch.tensor([0.0, 1.0, 0.04045, 0.0031308])
    image = torch.cartesian_prod(corners, corners, corners).T.reshape(3, 8, 8).requires_grad_()
    for values in ([0.0, 0.0], [50.0, 50.0], [-50.0, -50.0]):
        offset = torch.tensor(values, requires_grad=True)
        for gradient in torch.autograd.grad(shift_ab(image, offset, preserve_white).sum(), (image, offset)):
            assert gradient.isfinite().all()


def test_uint8_is_the_rounded_float_result(tile):
    offset = torch.tensor([8.0, -5.0])
    expected = (shift_ab(tile.double() / 255, offset.double()) * 255).round()
    difference = shift_ab(tile, offset).double() - expected
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


def test_looking_up_is_shifting_for_any_layout():
    offset = torch.tensor([5.0, 7.0])
    table = shift_table(offset)
    images = torch.randint(0, 256, (2, 2, 3, 37, 53), dtype=torch.uint8)
    for image in (images, images[0, 0], images[:, 0].to(memory_format=torch.channels_last), images[..., ::2, ::3]):
        assert torch.equal(look_up(image, table), shift_ab(image, offset))
    image = images[0].to(memory_format=torch.channels_last)
    assert look_up(image, table).is_contiguous(memory_format=torch.channels_last)


def test_with_scratch_memory_and_without_the_result_is_the_same():
    image, offset = torch.rand(3, 50, 60), torch.tensor([9.0, -20.0])
    with_gradient = shift_ab(image.clone().requires_grad_(), offset)
    torch.testing.assert_close(with_gradient.detach(), shift_ab(image, offset), atol=1e-5, rtol=0)
    torch.testing.assert_close(shift_batch(image, offset, True), shift_ab(image, offset), atol=1e-5, rtol=0)


def test_what_runs_on_cuda_is_the_same(monkeypatch):
    monkeypatch.setattr(color, "_CUDA_STRIP_PIXELS", 700)
    images = torch.rand(2, 3, 3, 40, 50)
    images[0, 1, :, 5, 6] = torch.nan
    offsets = torch.tensor([[9.0, -20.0], [0.0, 0.0], [-30.0, 4.0]]).expand(2, 3, 2)
    for batch, rows in ((images, offsets), (images[0], offsets[0]), (images[0, 2, :, :20], offsets[0, 2])):
        for image in (batch, batch.transpose(-3, -1).contiguous().transpose(-3, -1)):
            out, expected = color._in_strips(image, rows, True), shift_ab(image, rows)
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=0, equal_nan=True)
            assert out.stride() == expected.stride()
    levels = (255 * torch.rand(2, 3, 40, 50)).to(torch.uint8)
    assert torch.equal(color._in_strips(levels, offsets[0, :2], True), shift_ab(levels, offsets[0, :2]))


def test_constants_are_made_once():
    image, made = torch.rand(3, 8, 8), []
    for _ in range(2):
        with color._ConstantsOnce():
            lab = rgb_to_lab(image)
            made.append(torch.tensor([1.0, 2.0], device="cpu"))
        assert torch.equal(lab, rgb_to_lab(image))
    assert made[0] is made[1]
    assert torch.tensor([1.0, 2.0], device="cpu") is not made[0]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_memory_is_at_most_twice_that_of_the_image(dtype):
    image = torch.zeros(3, 4096, 4096, dtype=dtype).add_(1 if dtype == torch.uint8 else 0.5)
    shift_ab(image[:, :64], torch.ones(2))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    out = shift_ab(image, torch.ones(2))
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
    offset = torch.tensor([5.0, 5.0], requires_grad=True)
    tracked = image.clone().requires_grad_()
    for out in (shift_ab(image, offset.detach()), shift_ab(tracked, offset)):
        assert out[:, 0, 0].isnan().all()
        assert out[:, 1, 1].isnan().all()
        assert out.isnan().sum() == 6
    out[~out.isnan()].sum().backward()
    assert tracked.grad.isfinite().all()
    assert offset.grad.isfinite().all()
    assert offset.grad.ne(0).all()


@pytest.mark.parametrize(
    ("image", "offset", "error", "message"),
    [
        (torch.zeros(4, 4), torch.zeros(2), ValueError, r"shape \(\.\.\., 3, H, W\).*got \(4, 4\)"),
        (torch.zeros(1, 4, 4), torch.zeros(2), ValueError, r"got \(1, 4, 4\)"),
        (torch.zeros(3, 0, 4), torch.zeros(2), ValueError, r"H, W >= 1, got \(3, 0, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), torch.zeros(2), TypeError, "uint8 .* or floating point.*int32"),
        (torch.zeros(3, 4, 4, dtype=torch.bool), torch.zeros(2), TypeError, "bool"),
        (np.zeros((3, 4, 4)), torch.zeros(2), TypeError, "expected a tensor, got ndarray"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(3), ValueError, r"offset of shape \(2,\) or \(2, 2\).*got \(3,\)"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(3, 2), ValueError, r"got \(3, 2\)"),
    ],
)
def test_bad_input(image, offset, error, message):
    with pytest.raises(error, match=message):
        shift_ab(image, offset)


def test_random_offset_is_uniform_and_independent():
    offset = random_offset((20000,), 30.0, torch.Generator().manual_seed(0))
    assert offset.abs().max() <= 30
    torch.testing.assert_close(offset.std(dim=0), torch.full((2,), 30 / 3**0.5), atol=0.3, rtol=0)
    assert offset.T.corrcoef()[0, 1].abs() < 0.03
