"""PerturbStain in other libraries: what is drawn is PerturbStain's under a seed, and that comes from the library."""

import importlib
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from render_tiles import LABS, render_tile
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform import NormalizeStain, PerturbStain

PERTURB = PerturbStain(15)
WAYS = [
    {"multiprocessing_context": "fork"},
    {"multiprocessing_context": "fork", "persistent_workers": True},
    pytest.param({"multiprocessing_context": "spawn"}, marks=pytest.mark.slow),
]
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way.values())))


def example(name):
    library = {"albumentations_transform": "albumentations", "monai_pipeline": "monai"}[name]
    pytest.importorskip(library, reason=f'needs {library}: pip install -e ".[ecosystem]"')
    return importlib.import_module(name)


def under(seed, perturb, image):
    torch.manual_seed(seed)
    return perturb(image)


def array(image):
    return image.permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def normalize():
    return NormalizeStain.pretrained()


# Albumentations


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_random_stain_is_perturb_stain_under_the_seed_of_the_compose(dtype, tile):
    A = pytest.importorskip("albumentations")  # noqa: N806
    stain = example("albumentations_transform").RandomStain(15)
    boxes = A.BboxParams(format="pascal_voc", label_fields=["labels"])
    transform = A.Compose([stain, A.VerticalFlip(p=1)], bbox_params=boxes, seed=4)
    tensor = tile if dtype == np.uint8 else tile / 255
    mask = (array(tile)[..., 0] < 128).astype(np.uint8)
    numbers = random.Random(4)
    for _ in range(2):
        before = torch.get_rng_state()
        out = transform(image=array(tensor), mask=mask, bboxes=[(3, 4, 50, 60)], labels=[7])
        assert torch.equal(torch.get_rng_state(), before)
        expected = under(numbers.getrandbits(63), PERTURB, tensor)
        np.testing.assert_array_equal(out["image"], array(expected.flip(-2)))
        assert out["image"].dtype == dtype
        assert not np.array_equal(out["image"], array(tensor.flip(-2)))
        np.testing.assert_array_equal(out["mask"], mask[::-1])
        np.testing.assert_allclose(out["bboxes"], [(3, 128 - 60, 50, 128 - 4)], atol=1e-4)
        assert list(out["labels"]) == [7]


def test_the_seed_of_a_compose_decides_the_colors():
    A = pytest.importorskip("albumentations")  # noqa: N806
    RandomStain = example("albumentations_transform").RandomStain  # noqa: N806
    image = array(render_tile(0, 16))

    def draw(seed):
        transform = A.Compose([RandomStain()], seed=seed)
        return [transform(image=image)["image"].tobytes() for _ in range(5)]

    assert draw(1) == draw(1)
    draws = [*draw(1), *draw(2), *draw(None), *draw(None)]
    assert len({*draws, image.tobytes()}) == 21


def test_a_share_of_the_images_is_changed():
    A = pytest.importorskip("albumentations")  # noqa: N806
    transform = A.Compose([example("albumentations_transform").RandomStain(15, p=0.3)], seed=9)
    tensor = render_tile(0, 16)
    numbers = random.Random(9)
    changed = 0
    for _ in range(40):
        expected = tensor
        if numbers.random() < 0.3:
            expected = under(numbers.getrandbits(63), PERTURB, tensor)
            changed += 1
        np.testing.assert_array_equal(transform(image=array(tensor))["image"], array(expected))
    assert 4 < changed < 20


def test_images_of_one_call_share_their_change_and_it_can_be_replayed():
    A = pytest.importorskip("albumentations")  # noqa: N806
    RandomStain = example("albumentations_transform").RandomStain  # noqa: N806
    image = array(render_tile(0, 16))
    out = A.Compose([RandomStain()], additional_targets={"other": "image"})(image=image, other=image)
    np.testing.assert_array_equal(out["image"], out["other"])
    frames = A.Compose([RandomStain()])(images=np.stack([image, image]))["images"]
    np.testing.assert_array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[0], out["image"])
    replay = A.ReplayCompose([RandomStain()])(image=image)
    again = A.ReplayCompose.replay(replay["replay"], image=image)
    np.testing.assert_array_equal(again["image"], replay["image"])


def test_random_stain_is_written_down_and_refuses_bad_arguments():
    A = pytest.importorskip("albumentations")  # noqa: N806
    RandomStain = example("albumentations_transform").RandomStain  # noqa: N806
    image = array(render_tile(0, 16))
    transform = A.Compose([RandomStain(max_offset=25, preserve_white=False, p=0.5)], seed=1)
    copies = pickle.loads(pickle.dumps(transform)), A.from_dict(A.to_dict(transform))
    copies[1].set_random_seed(1)
    first, *others = ([each(image=image)["image"].tobytes() for _ in range(6)] for each in (transform, *copies))
    assert others == [first, first]
    assert len(set(first)) > 2
    assert RandomStain().max_offset == PerturbStain().max_offset == 25
    with pytest.raises(ValueError, match=r"max_offset from 0 to 128 Lab units, got -0\.1"):
        RandomStain(max_offset=-0.1)


class Arrays(Dataset):
    """A pink image with white in one corner, and the seed of its color."""

    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 12

    def __getitem__(self, index):
        out = self.transform(image=PINK)
        return out["image"], self.transform.transforms[0].params["torch_seed"], get_worker_info().id


PINK = np.full((8, 8, 3), (200, 120, 180), np.uint8)
PINK[:2, :2] = 255


def draws_of(transform, way, seed=0, init=None):
    """Two epochs in two workers: images, seeds and workers, in order."""
    loader = DataLoader(
        Arrays(transform),
        batch_size=3,
        num_workers=2,
        generator=torch.Generator().manual_seed(seed),
        worker_init_fn=init,
        **way,
    )
    batches = [batch for _ in range(2) for batch in loader]
    return [torch.cat(each) for each in zip(*batches, strict=True)]


@each_way
def test_workers_of_albumentations_draw_alike_unless_they_are_seeded(way):
    A = pytest.importorskip("albumentations")  # noqa: N806
    albumentations_transform = example("albumentations_transform")
    stain = albumentations_transform.RandomStain(15)
    flips = A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)

    seed_worker = albumentations_transform.seed_worker
    images, seeds, workers = draws_of(A.Compose([stain, *flips], seed=1), way, init=seed_worker)
    assert workers.unique().tolist() == [0, 1]
    assert len(set(seeds.tolist())) == len(seeds) == 24
    corners = Counter()
    for image, seed in zip(images, seeds.tolist(), strict=True):
        expected = array(under(seed, PERTURB, torch.from_numpy(PINK).permute(2, 0, 1)))
        down, right = (image[:, 0] == 255).all(dim=-1)[-1].item(), (image[0] == 255).all(dim=-1)[-1].item()
        both = (image[-1, -1] == 255).all().item()
        axes = [axis for axis, flipped in ((0, down or both), (1, right or both)) if flipped]
        np.testing.assert_array_equal(image.numpy(), np.flip(expected, axes))
        corners[tuple(axes)] += 1
    # Independent of each other, as they are not with A.Compose(seed=...).
    assert len(corners) == 4

    again = draws_of(A.Compose([stain, *flips], seed=2), way, init=seed_worker)
    assert torch.equal(again[0], images)
    other = draws_of(A.Compose([stain, *flips], seed=1), way, seed=1, init=seed_worker)
    assert not set(other[1].tolist()) & set(seeds.tolist())


def test_what_the_example_says_of_albumentations():
    A = pytest.importorskip("albumentations")  # noqa: N806
    if A.__version__ != "2.0.8":
        pytest.skip(f"said of Albumentations 2.0.8, not of {A.__version__}")
    stain = example("albumentations_transform").RandomStain()
    for seed in (None, 3):
        _, seeds, workers = draws_of(A.Compose([stain], seed=seed), {"multiprocessing_context": "fork"})
        assert torch.equal(seeds[workers == 0], seeds[workers == 1])
        assert torch.equal(seeds[:12], seeds[12:])
    flips = A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)], seed=3)
    outcomes = {flips(image=PINK)["image"].tobytes() for _ in range(40)}
    assert outcomes == {PINK.tobytes(), PINK[::-1, ::-1].tobytes()}


# MONAI


@pytest.fixture
def monai_pipeline():
    module = example("monai_pipeline")
    yield module
    from monai.utils import set_determinism

    set_determinism(None)


def meta_sample():
    from monai.data import MetaTensor

    affine = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0]))
    image = MetaTensor(render_tile(1, 16) / 255, affine=affine, meta={"filename_or_obj": "a.png"})
    return {"image": image, "mask": MetaTensor(torch.arange(256.0).reshape(1, 16, 16)), "label": 3}


def seeds_of(state, count):
    """What a Compose of one transform draws, by hand: the seeds of torch."""
    inner = np.random.RandomState(state.randint(2**32 - 1, dtype="uint32"))
    found = []
    for _ in range(count):
        inner.rand()
        found.append(int(inner.randint(2**32 - 1, dtype="uint32")))
    return found


def test_rand_perturb_stain_is_perturb_stain_under_the_state_of_the_compose(monai_pipeline):
    from monai.data import MetaTensor
    from monai.transforms import Compose

    compose = Compose([monai_pipeline.RandPerturbStaind("image", PERTURB)]).set_random_state(5)
    sample = meta_sample()
    for seed in seeds_of(np.random.RandomState(5), 3):
        before = torch.get_rng_state()
        out = compose(sample)
        assert torch.equal(torch.get_rng_state(), before)
        assert type(out["image"]) is MetaTensor
        expected = under(seed, PERTURB, sample["image"].as_tensor())
        assert torch.equal(out["image"].as_tensor(), expected)
        assert not torch.equal(expected, sample["image"].as_tensor())
        assert out["image"].meta["filename_or_obj"] == "a.png"
        assert torch.equal(out["image"].affine, sample["image"].affine)
        assert out["mask"] is sample["mask"]
        assert out["label"] == 3
    torch.testing.assert_close(sample["image"].as_tensor(), render_tile(1, 16) / 255)


def test_the_array_version_draws_as_the_one_for_dictionaries(monai_pipeline):
    from monai.transforms import Compose

    image = meta_sample()["image"]
    alone, inside = (
        Compose([each]).set_random_state(8)
        for each in (
            monai_pipeline.RandPerturbStain(PERTURB, prob=0.5),
            monai_pipeline.RandPerturbStaind("image", PERTURB, prob=0.5),
        )
    )
    changed = [not torch.equal(image, out) for out in (alone(image) for _ in range(20))]
    assert changed == [not torch.equal(image, inside({"image": image})["image"]) for _ in range(20)]
    assert 4 < sum(changed) < 16


def test_images_of_one_dictionary_share_their_change(monai_pipeline):
    perturb = monai_pipeline.RandPerturbStaind(["image", "other"], PERTURB, allow_missing_keys=True)
    image = meta_sample()["image"]
    out = perturb({"image": image, "other": image})
    assert torch.equal(out["image"], out["other"])
    assert not torch.equal(out["image"], perturb({"image": image})["image"])
    with pytest.raises(KeyError, match="other"):
        monai_pipeline.RandPerturbStaind(["image", "other"], PERTURB)({"image": image})


def test_set_determinism_reaches_a_compose_that_is_built_after_it(monai_pipeline):
    from monai.transforms import Compose
    from monai.utils import set_determinism

    def draw(seed):
        set_determinism(seed)
        compose = Compose([monai_pipeline.RandPerturbStaind("image", PERTURB)])
        return [compose(meta_sample())["image"].as_tensor().numpy().tobytes() for _ in range(3)]

    assert draw(3) == draw(3)
    assert len({*draw(3), *draw(4)}) == 6


def test_a_cache_keeps_no_color(monai_pipeline):
    from monai.data import CacheDataset
    from monai.transforms import Compose, Lambdad

    def epochs(transform):
        dataset = CacheDataset([meta_sample()], Compose([transform]), progress=False)
        return [dataset[0]["image"].as_tensor() for _ in range(2)]

    assert not torch.equal(*epochs(monai_pipeline.RandPerturbStaind("image", PERTURB)))
    # As the example says.
    assert torch.equal(*epochs(Lambdad("image", PERTURB)))


@each_way
@pytest.mark.filterwarnings("ignore")  # of MONAI, in spawned workers
def test_workers_of_monai_draw_differently_by_its_own_loader(monai_pipeline, way):
    from monai.data import DataLoader as MonaiLoader
    from monai.data import Dataset as MonaiDataset
    from monai.transforms import Compose
    from monai.utils import set_determinism

    gray = torch.full((3, 8, 8), 0.5)

    def draw(loader, generator=None):
        dataset = MonaiDataset(
            [{"image": gray}] * 12, Compose([monai_pipeline.RandPerturbStaind("image", PerturbStain())])
        )
        batches = loader(dataset, batch_size=3, num_workers=2, generator=generator, **way)
        return [image.numpy().tobytes() for _ in range(2) for batch in batches for image in batch["image"]]

    first = draw(MonaiLoader, torch.Generator().manual_seed(1))
    assert len(set(first)) == 24
    assert draw(MonaiLoader, torch.Generator().manual_seed(1)) == first
    assert not set(draw(MonaiLoader, torch.Generator().manual_seed(2))) & set(first)
    set_determinism(1)
    determined = draw(MonaiLoader)
    set_determinism(1)
    assert draw(MonaiLoader) == determined
    # As the example says: torch's loader seeds torch, not MONAI.
    alike = draw(DataLoader)
    assert alike[:3] == alike[3:6]


def test_monai_reads_flips_and_perturbs(monai_pipeline, tmp_path, normalize):
    tile = render_tile(2, 32)
    dark = tile[0] < 150
    to_pil_image(tile).save(tmp_path / "a.png")
    to_pil_image(dark.byte() * 5).save(tmp_path / "mask.png")
    pipeline = monai_pipeline.for_training(normalize, PERTURB).set_random_state(0)
    (step,) = [each for each in pipeline.transforms if isinstance(each, monai_pipeline.RandPerturbStaind)]
    seen = set()
    for _ in range(12):
        out = pipeline({"image": tmp_path / "a.png", "mask": tmp_path / "mask.png"})
        mask = 5.0 * dark[None]
        (axes,) = [
            axes for axes in ((), (-1,), (-2,), (-1, -2)) if torch.equal(out["mask"].as_tensor(), mask.flip(axes))
        ]
        expected = under(step.perturb.torch_seed, PERTURB, normalize(tile / 255)).flip(axes)
        torch.testing.assert_close(out["image"].as_tensor(), expected, atol=1e-5, rtol=0)
        seen.add(axes)
    assert len(seen) == 4
    assert monai_pipeline.for_training(normalize)({"image": tmp_path / "a.png"})["image"].shape == (3, 32, 32)


# torchvision


def white_square(top, left, bottom, right, size=96):
    """Tissue with a white square, which no color change touches, its mask and its box."""
    image = render_tile(3, size, LABS["lab_b"]).clamp(max=230)
    image[:, top:bottom, left:right] = 255
    mask = torch.zeros(size, size, dtype=torch.uint8)
    mask[top:bottom, left:right] = 7
    return {
        "image": tv_tensors.Image(image),
        "mask": tv_tensors.Mask(mask),
        "boxes": tv_tensors.BoundingBoxes([[left, top, right, bottom]], format="XYXY", canvas_size=(size, size)),
        "labels": torch.tensor([4]),
    }


def test_masks_and_boxes_follow_the_geometry_and_not_the_color(normalize):
    import torchvision_pipeline

    compose = torchvision_pipeline.for_training(normalize, PERTURB, size=96)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    sample = white_square(30, 20, 70, 50)
    torch.manual_seed(0)
    colors = set()
    for _ in range(10):
        out = compose(sample)
        image = out["image"] * std + mean
        assert out["mask"].unique().tolist() == [0, 7]
        assert out["mask"].dtype == torch.uint8
        assert out["labels"].tolist() == [4]
        # The white square was moved with its mask and its box, but for a border that interpolation blurs.
        white = (image > 0.99).all(dim=0)
        inside = (out["mask"] == 7).as_subclass(torch.Tensor)[None].float()
        grown, shrunk = (F.max_pool2d(inside, 5, 1, 2) > 0)[0], (F.max_pool2d(1 - inside, 5, 1, 2) == 0)[0]
        assert white[shrunk].all()
        assert not white[~grown].any()
        rows, columns = white.nonzero(as_tuple=True)
        found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        torch.testing.assert_close(out["boxes"].float()[0].as_subclass(torch.Tensor), found.float(), atol=2.5, rtol=0)
        colors.add(tuple(image[:, ~white].mean(dim=1).tolist()))
    assert len(colors) == 10


def test_the_torchvision_pipeline_is_its_parts_by_hand(normalize):
    import torchvision_pipeline

    compose = torchvision_pipeline.for_training(normalize, PERTURB, size=48)
    sample = white_square(10, 10, 90, 90)
    torch.manual_seed(6)
    out = compose(sample)
    image = under(6, PERTURB, normalize(sample["image"]))
    rest = v2.Compose(compose.transforms[2:])({**sample, "image": image})
    assert not any(isinstance(each, NormalizeStain | PerturbStain) for each in compose.transforms[2:])
    assert torch.equal(out["image"], rest["image"])
    assert torch.equal(out["mask"], rest["mask"])
    assert torch.equal(out["boxes"], rest["boxes"])


def test_boxes_that_are_cut_off_go_with_their_labels(normalize):
    import torchvision_pipeline

    compose = torchvision_pipeline.for_training(normalize, PERTURB, size=48)
    sample = white_square(0, 0, 6, 6)
    torch.manual_seed(0)
    counts = Counter()
    for _ in range(20):
        out = compose(sample)
        assert len(out["boxes"]) == len(out["labels"])
        counts[len(out["boxes"])] += 1
    assert set(counts) == {0, 1}


# Multi-crop


def flat(size=64):
    """Of one color, which NormalizeStain leaves as it is, crops too, and of which PerturbStain makes one color."""
    return torch.tensor([200, 120, 180], dtype=torch.uint8).view(3, 1, 1).expand(3, size, size).contiguous()


def color_of(crop):
    (color,) = crop.flatten(1).T.unique(dim=0)
    return tuple(color.tolist())


def test_every_crop_has_its_own_color():
    from multi_crop import MultiCrop

    crops = MultiCrop(local_crops=6, global_size=32, local_size=16)
    torch.manual_seed(0)
    for image in (flat(), to_pil_image(flat())):
        out = crops(image)
        assert [each.shape for each in out] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 6
        assert len({color_of(each) for each in out}) == 8


def test_crops_are_of_the_whole_tile_normalized_once(normalize):
    from multi_crop import MultiCrop

    seen = []
    own = NormalizeStain.pretrained()
    own.register_forward_hook(lambda module, given, out: seen.append(out))
    tile = render_tile(4, 96)
    still = PerturbStain(max_offset=0)
    out = MultiCrop(own, still, local_crops=3, global_size=32, local_size=16)(tile)
    (normalized,) = seen
    assert torch.equal(normalized, normalize(tile))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    low, high = (each.view(3, 1) for each in (normalized / 255).flatten(1).aminmax(dim=1))
    for each in out:
        pixels = (each * std + mean).flatten(1)
        # Bicubic filters overshoot.
        assert (pixels > low - 0.1).all()
        assert (pixels < high + 0.1).all()


def test_a_seed_decides_the_crops_and_a_loader_makes_batches():
    from multi_crop import MultiCrop

    crops = MultiCrop(local_crops=2, global_size=32, local_size=16)
    tiles = [render_tile(seed, 64) for seed in range(3)]
    torch.manual_seed(1)
    batches, labels = torch.utils.data.default_collate([(crops(tile), label) for label, tile in enumerate(tiles)])
    assert [each.shape for each in batches] == [(3, 3, 32, 32)] * 2 + [(3, 3, 16, 16)] * 2
    assert labels.tolist() == [0, 1, 2]
    first, again, other = (under(seed, crops, tiles[0]) for seed in (1, 1, 2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(first, other, strict=True))


def test_which_crops_share_their_color():
    """As the docstring of multi_crop.py says."""
    crops = [flat(32), flat(32), flat(16)]
    for kind in (to_pil_image, tv_tensors.Image):
        shared = [v2.functional.to_image(out) for out in PERTURB([kind(crop) for crop in crops])]
        assert len({color_of(each) for each in shared}) == 1
        assert color_of(shared[0]) != color_of(crops[0])
    assert len({color_of(each) for each in PERTURB(torch.stack(crops[:2]))}) == 2
    first, *others = PERTURB(crops)
    assert color_of(first) != color_of(crops[0])
    assert all(torch.equal(*pair) for pair in zip(others, crops[1:], strict=True))
