"""The augmentations of other libraries, as they are compared."""

import numpy as np
import pytest
import torch
from lab_augmentations import AUGMENTATIONS, COLOR_JITTER
from render_tiles import LABS, render_tile

SIDE = 64


@pytest.fixture(scope="module")
def images():
    return torch.stack([render_tile(number, SIDE, LABS["lab_a"]) for number in range(4)])


def make(name, images, seed=0):
    augmentation = AUGMENTATIONS[name]
    pytest.importorskip(augmentation.library, reason=f"needs {augmentation.library}: pip install -e '.[evidence]'")
    return augmentation.on_batches(images, seed)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_image_of_a_batch_has_a_change_of_its_own(name, images):
    batch = images[:1].repeat(3, 1, 1, 1) / 255
    before = batch.clone()
    torch.manual_seed(0)
    out = make(name, images)(batch)
    assert torch.equal(batch, before)
    assert (out.shape, out.dtype) == (batch.shape, torch.float32)
    assert out.min() >= 0
    assert out.max() <= 1
    for one, other in ((0, 1), (1, 2)):
        assert (out[one] - out[other]).abs().mean() > 0.002
    # As strong as augmentation is, and no stronger.
    assert 0.005 < (out - batch).abs().mean() < 0.3


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_seed_repeats_it(name, images):
    def drawn(seed):
        torch.manual_seed(seed)
        return make(name, images, seed)(images / 255)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_randstainna_takes_the_colors_of_the_training_images(images):
    """Of images that are all alike, there is one color to take."""
    cv2 = pytest.importorskip("cv2", reason="needs cv2: pip install -e '.[evidence]'")

    def statistics(image):
        lab = cv2.cvtColor((image * 255).round().byte().permute(1, 2, 0).numpy(), cv2.COLOR_RGB2LAB)
        return np.stack([lab.mean((0, 1)), lab.std((0, 1))])

    others = torch.stack([render_tile(number, SIDE, LABS["lab_b"]) for number in range(3)]) / 255
    out = make("randstainna", images[:1].repeat(3, 1, 1, 1))(others)
    expected = statistics(images[0] / 255)
    for before, after in zip(others, out, strict=True):
        assert np.abs(statistics(before) - expected).max() > 10
        # But for clipping.
        assert np.abs(statistics(after) - expected).max() < 4


def test_hed_jitter_moves_the_stains_as_much_as_it_says(images):
    color = pytest.importorskip("skimage.color", reason="needs scikit-image: pip install -e '.[dev]'")

    def stains(images):
        density = -((images.double() * 255 + 1) / 256).log().permute(0, 2, 3, 1).flatten(1, 2).numpy()
        return density @ color.hed_from_rgb

    light = torch.rand(40, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.5
    before, after = stains((light * 255).round() / 255), stains(make("hed-jitter", images)(light))
    for stain in range(3):
        lines = [np.polyfit(x, y, 1) for x, y in zip(before[..., stain], after[..., stain], strict=True)]
        factor, shift = np.array(lines).T
        assert np.abs(factor - 1).max() < 0.22
        assert np.ptp(factor) > 0.3
        assert np.abs(shift).max() < 0.22
        assert np.ptp(shift) > 0.3


def test_hestain_is_that_of_albumentations(images):
    albumentations = pytest.importorskip("albumentations", reason="needs albumentations: pip install -e '.[evidence]'")
    transform = albumentations.Compose([albumentations.HEStain(method="random_preset", p=1)], seed=3)
    out = make("hestain", images, 3)(images / 255)
    for image, found in zip(images, out, strict=True):
        expected = transform(image=image.permute(1, 2, 0).numpy())["image"]
        assert np.array_equal((found * 255).round().byte().permute(1, 2, 0).numpy(), expected)


def test_color_jitter_is_that_of_torchvision(images):
    from torchvision.transforms import v2

    jitter = v2.ColorJitter(**COLOR_JITTER)
    torch.manual_seed(5)
    expected = torch.stack([jitter(image / 255) for image in images])
    torch.manual_seed(5)
    assert torch.equal(make("color-jitter", images)(images / 255), expected)


def test_an_image_without_stains_stays(images):
    blank = torch.full((2, 3, SIDE, SIDE), 240) / 255
    assert torch.equal(make("stain-augmentor", images)(blank), blank)
