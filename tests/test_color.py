import numpy as np
import pytest
import skimage.color
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia.color import lab_to_rgb, rgb_to_lab

from stainnorm_transform.color import random_offset, shift_ab

OFFSETS = [(50, 50), (-50, 50), (50, -50), (-50, -50), (50, 0), (0, -50), (12.5, -24.2), (0.5, 0.25)]
BOTH = pytest.mark.parametrize("preserve_white", [True, False])


def rgb_cube(steps: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Every combination of ``steps`` levels of red, green and blue: (3, steps, steps ** 2)."""
    level = torch.linspace(0, 1, steps, dtype=dtype)
    return torch.stack(torch.meshgrid(level, level, level, indexing="ij")).reshape(3, steps, -1)


def fade(lab, preserve_white: bool):
    return ((97 - lab[..., :1, :, :]) / 37).clip(0, 1) if preserve_white else 1


@BOTH
@pytest.mark.parametrize("offset", OFFSETS)
def test_agrees_with_kornia_over_the_cube(offset, preserve_white):
    image = rgb_cube(52)
    lab = rgb_to_lab(image)
    expected = lab_to_rgb(lab + fade(lab, preserve_white) * torch.tensor([0.0, *offset]).view(3, 1, 1))
    out = shift_ab(image, torch.tensor(offset, dtype=torch.float32), preserve_white)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


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
    out = shift_ab(image, torch.zeros(2, dtype=dtype), preserve_white)
    torch.testing.assert_close(out, image, atol=1e-5 if dtype == torch.float32 else 1e-13, rtol=0)


def test_zero_offset_returns_every_uint8_color():
    level = torch.arange(256, dtype=torch.uint8)
    for red in range(0, 256, 15):
        green, blue = torch.meshgrid(level, level, indexing="ij")
        image = torch.stack([torch.full_like(green, red), green, blue])
        assert torch.equal(shift_ab(image, torch.zeros(2)), image)


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


@pytest.mark.parametrize("size", [(97, 63), (600, 401), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_batch_equals_its_images_to_the_last_bit(size, dtype):
    images = torch.rand(5, 3, *size)
    images = (images * 255).to(torch.uint8) if dtype == torch.uint8 else images
    offsets = random_offset((5,), 30.0)
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
    out = shift_ab(image, torch.tensor([5.0, 5.0]))
    assert out[:, 0, 0].isnan().all()
    assert out.isnan().sum() == 3


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
