"""NormalizeStain and PerturbStain in kornia's containers."""

import pickle
import sys

import kornia
import kornia.augmentation as K
import kornia_pipeline
import pytest
import torch
from kornia.augmentation import container
from render_tiles import LABS, render_tile
from synthetic import ROOT

from stainnorm_transform import NormalizeStain, PerturbStain

BOXES = torch.tensor([[[3.0, 4.0, 50.0, 60.0], [0.0, 0.0, 20.0, 10.0]]]).expand(3, 2, 4)
POINTS = torch.tensor([[[3.0, 4.0], [30.0, 60.0]]]).expand(3, 2, 2)
CORNERS = torch.tensor([[[3.0, 4.0], [50.0, 4.0], [50.0, 60.0], [3.0, 60.0]]])[None].expand(3, 1, 4, 2)
FLIPS = [], [-1], [-2], [-1, -2]


@pytest.fixture(scope="module")
def images():
    return torch.stack([render_tile(seed, 64, lab) for seed, lab in enumerate(LABS.values())]) / 255


@pytest.fixture(scope="module")
def masks(images):
    return (images.mean(dim=1, keepdim=True) < 0.6).float()


@pytest.fixture(scope="module")
def normalize():
    return NormalizeStain.pretrained()


def test_sequential_is_the_parts_by_hand(images, normalize):
    sequence = K.ImageSequential(
        normalize, K.RandomHorizontalFlip(p=1.0), kornia.filters.GaussianBlur2d((3, 3), (1, 1))
    )
    by_hand = kornia.filters.gaussian_blur2d(normalize(images).flip(-1), (3, 3), (1.0, 1.0))
    torch.testing.assert_close(sequence(images), by_hand)
    assert not torch.allclose(normalize(images), images, atol=0.02)


def test_a_batch_is_its_images(images, normalize):
    sequence = K.ImageSequential(normalize, K.RandomVerticalFlip(p=1.0))
    one_by_one = torch.cat([sequence(image[None]) for image in images])
    torch.testing.assert_close(sequence(images), one_by_one, atol=1e-5, rtol=0)


def test_perturbing_draws_as_it_does_alone(images):
    perturb = PerturbStain(max_offset=15)
    torch.manual_seed(4)
    alone = perturb(images)
    torch.manual_seed(4)
    inside = K.AugmentationSequential(perturb, data_keys=["input"])(images)
    assert torch.equal(inside, alone)
    assert (alone - images).flatten(1).abs().amax(dim=1).min() > 0.01


@pytest.mark.parametrize("make", [NormalizeStain.pretrained, PerturbStain], ids=["normalize", "perturb"])
def test_masks_boxes_and_keypoints_pass(make, images, masks):
    augment = K.AugmentationSequential(make(), data_keys=["input", "mask", "bbox_xyxy", "keypoints", "bbox"])
    image, *others = augment(images, masks, BOXES, POINTS, CORNERS)
    for out, given in zip(others, (masks, BOXES, POINTS, CORNERS), strict=True):
        assert torch.equal(out, given)
        assert out.dtype == given.dtype
    assert (image - images).abs().max() > 0.02


def test_masks_and_boxes_follow_the_geometry(images, masks, normalize):
    keys = ["input", "mask", "bbox_xyxy", "keypoints"]
    with_ours = K.AugmentationSequential(normalize, K.RandomHorizontalFlip(p=1.0), data_keys=keys)
    without = K.AugmentationSequential(K.RandomHorizontalFlip(p=1.0), data_keys=keys)
    image, *others = with_ours(images, masks, BOXES, POINTS)
    _, *expected = without(images, masks, BOXES, POINTS)
    assert torch.equal(image, normalize(images).flip(-1))
    assert torch.equal(others[0], masks.flip(-1))
    assert all(torch.equal(*pair) for pair in zip(others, expected, strict=True))
    assert not torch.equal(others[1], BOXES)


def test_inverse_undoes_the_geometry_and_leaves_the_color(images, masks, normalize):
    augment = K.AugmentationSequential(normalize, K.RandomHorizontalFlip(p=1.0), data_keys=["input", "mask"])
    image, mask = augment.inverse(*augment(images, masks))
    torch.testing.assert_close(image, normalize(images), atol=1e-5, rtol=0)
    assert torch.equal(mask, masks)


@pytest.mark.skipif(not hasattr(container.ops, "ClassSequentialOps"), reason="an older kornia: no labels")
def test_dictionaries_and_labels(images, masks, normalize):
    augment = K.AugmentationSequential(normalize, K.RandomVerticalFlip(p=1.0), data_keys=None)
    out = augment({"image": images, "mask": masks, "label": torch.arange(3)})
    assert torch.equal(out["image"], normalize(images).flip(-2))
    assert torch.equal(out["mask"], masks.flip(-2))
    assert torch.equal(out["label"], torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float64])
def test_dtype_stays(dtype, images, normalize):
    given = (images * 255).to(dtype) if dtype == torch.uint8 else images.to(dtype)
    out = K.AugmentationSequential(normalize)(given)
    assert out.dtype == dtype
    assert torch.equal(out, normalize(given))


def test_gradients_reach_the_images_and_nothing_of_ours_learns(images, normalize):
    augment = K.AugmentationSequential(normalize, K.RandomHorizontalFlip(p=1.0), data_keys=["input"])
    inside, alone = images.clone().requires_grad_(), images.clone().requires_grad_()
    factors = torch.linspace(0, 1, 64)
    (augment(inside) * factors).sum().backward()
    (normalize(alone) * factors.flip(0)).sum().backward()
    torch.testing.assert_close(inside.grad, alone.grad)
    assert inside.grad.abs().sum() > 0
    assert not list(augment.parameters())


def test_nested_random_and_pickled(images, masks):
    parts = K.ImageSequential(NormalizeStain.pretrained(), PerturbStain(10)), K.RandomHorizontalFlip(p=0.5)
    augment = K.AugmentationSequential(*parts, data_keys=["input", "mask"], random_apply=2)
    for each in (augment, pickle.loads(pickle.dumps(augment))):
        image, mask = each(images, masks)
        assert image.shape == images.shape
        assert mask.sum() == masks.sum()


def test_the_example_is_the_parts_by_hand(images, masks, normalize):
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = (normalize(images) - mean) / std
    torch.testing.assert_close(kornia_pipeline.for_inference(normalize)(images), expected, atol=1e-4, rtol=0)

    torch.manual_seed(1)
    perturb = PerturbStain(max_offset=10)
    states = []
    perturb.register_forward_pre_hook(lambda module, given: states.append(torch.get_rng_state()))
    augment = kornia_pipeline.for_training(normalize, perturb)
    colors, seen = set(), set()
    for _ in range(6):
        image, mask, boxes = augment(images, masks, BOXES)
        torch.set_rng_state(states.pop())
        expected = PerturbStain(max_offset=10)(normalize(images))
        for index in range(3):
            (axes,) = [axes for axes in FLIPS if torch.equal(mask[index], masks[index].flip(axes))]
            torch.testing.assert_close(image[index], expected[index].flip(axes), atol=1e-5, rtol=0)
            left, top, right, bottom = BOXES[index].T
            if -1 in axes:
                left, right = 63 - right, 63 - left
            if -2 in axes:
                top, bottom = 63 - bottom, 63 - top
            torch.testing.assert_close(boxes[index], torch.stack([left, top, right, bottom], dim=1), atol=1, rtol=0)
            colors.add(tuple(image[index].mean(dim=(1, 2)).tolist()))
            seen.add(tuple(axes))
    assert len(colors) == 18
    assert len(seen) == 4


def test_the_command(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["kornia_pipeline.py", "--tiles", "examples/tiles"])
    kornia_pipeline.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "for inference: (6, 3, 256, 256)"
    assert [line.partition(":")[0] for line in lines[1:]] == [
        f"examples/tiles/lab_{lab}/tile_{number}.png" for lab in "abc" for number in (1, 2)
    ]
