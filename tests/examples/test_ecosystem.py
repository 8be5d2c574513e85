import dataclasses
import importlib
import pickle
import re
import shlex
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from render_tiles import LABS, render_tile
from synthetic import ROOT, make_slide, tissue
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.datasets import PCAM, ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from stainnorm_transform import NormalizeStain

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TO_FLOAT = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def needs(module: str) -> Any:
    return pytest.importorskip(module, reason=f'needs {module}: pip install -e ".[ecosystem]"')


@pytest.fixture(scope="module")
def normalize() -> NormalizeStain:
    return NormalizeStain.pretrained()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiles of three labs, 64 x 64, one folder a lab."""
    root = tmp_path_factory.mktemp("labs")
    for number, (name, lab) in enumerate(LABS.items()):
        (root / name).mkdir()
        for tile in range(3):
            to_pil_image(render_tile(10 * number + tile, 64, lab)).save(root / name / f"{tile}.png")
    return root


def open_all(paths):
    return [Image.open(path).convert("RGB") for path in paths]


def unit(image):
    """By hand: a PIL image as float (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def standardize(image, mean, std):
    return (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize(
    "transform",
    [
        v1.Compose([NormalizeStain.pretrained(), v1.ToTensor(), v1.Normalize(*IMAGENET)]),
        v2.Compose(
            [NormalizeStain.pretrained(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET)]
        ),
    ],
    ids=["v1", "v2"],
)
def test_image_folder(transform, folder, normalize):
    images = ImageFolder(folder, transform)
    assert images.classes == list(LABS)
    for (image, label), (path, truth) in zip(images, images.samples, strict=True):
        assert label == truth
        close(torch.Tensor(image), standardize(unit(normalize(Image.open(path).convert("RGB"))), *IMAGENET))
    batch, labels = next(iter(DataLoader(images, batch_size=9, num_workers=1)))
    assert batch.shape == (9, 3, 64, 64)
    assert labels.tolist() == images.targets


def test_pcam(tmp_path, normalize):
    h5py = needs("h5py")
    tiles = torch.stack([render_tile(seed, 96) for seed in range(3)])
    (tmp_path / "pcam").mkdir()
    with h5py.File(tmp_path / "pcam/camelyonpatch_level_2_split_valid_x.h5", "w") as file:
        file["x"] = tiles.permute(0, 2, 3, 1).numpy()
    with h5py.File(tmp_path / "pcam/camelyonpatch_level_2_split_valid_y.h5", "w") as file:
        file["y"] = np.array([0, 1, 1], dtype=np.uint8).reshape(3, 1, 1, 1)
    to_float = v2.ToImage(), v2.ToDtype(torch.float32, scale=True)
    for transform, tolerance in (
        (v2.Compose([normalize, *to_float]), 0.51 / 255),
        (v2.Compose([*to_float, normalize]), 1e-5),
    ):
        images = PCAM(tmp_path, "val", transform=transform)
        batch, labels = next(iter(DataLoader(images, batch_size=3)))
        assert labels.tolist() == [0, 1, 1]
        assert type(images[0][1]) is int
        # A PIL image is rounded to 8 bits after normalizing.
        close(batch, normalize(tiles / 255), tolerance)


def test_finetuned_resnet(data, tmp_path, normalize):
    import finetune_resnet

    for name in ("normal", "tumor"):
        (tmp_path / name).mkdir()
        for path in sorted((data / "camelyon16" / "utrecht" / name).iterdir())[:8]:
            (tmp_path / name / path.name).symlink_to(path.resolve())
    images = ImageFolder(tmp_path, v2.Compose([v2.Resize((96, 96)), TO_FLOAT]))
    torch.manual_seed(0)
    model = finetune_resnet.build(len(images.classes))
    trained = {id(parameter) for parameter in model.parameters()}
    assert trained == {id(parameter) for parameter in model[2].parameters()}
    kernel = model[2].conv1.weight.detach().clone()

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    loader = DataLoader(images, batch_size=8, shuffle=True)
    for _ in range(3):
        finetune_resnet.train_epoch(model, optimizer, loader)
    assert not torch.equal(model[2].conv1.weight, kernel)
    shipped = normalize.state_dict()
    assert all(torch.equal(value, shipped[name]) for name, value in model[0].state_dict().items())

    finetune_resnet.save(model, images.classes, tmp_path / "model.safetensors")
    loaded, classes = finetune_resnet.load(tmp_path / "model.safetensors")
    assert classes == ["normal", "tumor"]
    batch, labels = next(iter(DataLoader(images, batch_size=16)))
    logits = model.eval()(batch)
    assert torch.equal(loaded(batch), logits)
    by_hand = model[2](standardize(normalize(batch), *IMAGENET))
    close(logits, by_hand)
    expected = (by_hand.argmax(1) == labels).float().mean().item()
    assert finetune_resnet.accuracy(loaded, DataLoader(images, batch_size=5)) == pytest.approx(expected)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    import finetune_resnet
    from safetensors.torch import save_file

    state = finetune_resnet.build(2).state_dict()
    without = {name: value for name, value in state.items() if not name.startswith("0.")}
    save_file(without, tmp_path / "model.safetensors", metadata={"classes": '["a", "b"]'})
    with pytest.raises(RuntimeError, match="Missing key"):
        finetune_resnet.load(tmp_path / "model.safetensors")


def test_timm_both_ways(normalize):
    timm = needs("timm")
    import timm_model

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5).eval()
    config = model.default_cfg
    assert config["input_size"] == (3, 160, 160)
    assert config["mean"] == (0.5, 0.5, 0.5) != IMAGENET[0]

    def resize(image):
        side = int(160 / config["crop_pct"])
        return v2.functional.center_crop(image.resize((side, side), Image.Resampling.BICUBIC), [160, 160])

    def features(image):
        return model(standardize(image, config["mean"], config["std"])[None])

    tile = to_pil_image(render_tile(1, 256))
    transform, layers = timm_model.as_layer(model)
    batch = transform(tile)[None]
    assert torch.equal(batch[0], pil_to_tensor(resize(tile)))
    close(layers(batch), features(unit(normalize(resize(tile)))))
    # Floats are not rounded.
    close(layers(batch / 255), features(normalize(batch[0] / 255)))

    transform, network = timm_model.in_loader(model)
    close(network(transform(tile)[None]), features(unit(resize(normalize(tile)))))


def test_monai_pipeline(data, normalize):
    needs("monai")
    import monai_pipeline
    from monai.data import DataLoader as MonaiLoader
    from monai.data import Dataset, MetaTensor, decollate_batch

    paths = sorted((data / "camelyon17" / "center_2").glob("*.png"))[:3]
    expected = [normalize(unit(image)) for image in open_all(paths)]
    dataset = Dataset([{"image": path} for path in paths], monai_pipeline.for_inference())
    for sample, path, truth in zip(dataset, paths, expected, strict=True):
        image = sample["image"]
        assert type(image) is MetaTensor
        assert image.meta["filename_or_obj"] == str(path)
        assert torch.equal(image.affine, torch.eye(4))
        close(image.as_tensor(), truth)
    (batch,) = MonaiLoader(dataset, batch_size=3, num_workers=1)
    assert [sample["image"].meta["filename_or_obj"] for sample in decollate_batch(batch)] == [
        str(path) for path in paths
    ]
    close(batch["image"].as_tensor(), torch.stack(expected))


@pytest.fixture
def meta_batch():
    """A batch of tiles as MONAI's loader gives it, and the same as a plain tensor."""
    needs("monai")
    from monai.data import MetaTensor, list_data_collate

    tiles = torch.stack([render_tile(seed, 64) for seed in range(3)]) / 255
    samples = [{"image": MetaTensor(tile, meta={"filename_or_obj": f"{seed}.png"})} for seed, tile in enumerate(tiles)]
    return list_data_collate(samples)["image"], tiles


@pytest.mark.parametrize("gradient", [False, True])
def test_monai_batch_before_a_model_keeps_its_meta(gradient, meta_batch, normalize):
    batch, tiles = meta_batch
    out = normalize(batch.clone().requires_grad_(gradient))
    assert out.meta["filename_or_obj"] == ["0.png", "1.png", "2.png"]
    close(out.detach().as_tensor(), normalize(tiles))


def test_monai_batches_give_a_slide_its_map(meta_batch, normalize):
    batch, tiles = meta_batch
    fixed = normalize.for_slide([batch])
    assert type(fixed.fixed_map) is torch.Tensor
    close(fixed.fixed_map, normalize.for_slide(tiles).fixed_map)
    close(fixed(tiles[0]), normalize.for_slide(tiles)(tiles[0]))
    assert fixed(batch[0]).meta["filename_or_obj"] == "0.png"


@pytest.mark.filterwarnings("ignore")
def test_lightning_checkpoint_predicts_the_same(folder, tmp_path, normalize):
    lightning = needs("lightning")
    import lightning_module

    lightning.seed_everything(0, verbose=False)
    module = lightning_module.Classifier(3)
    groups = module.configure_optimizers().param_groups
    assert {id(each) for group in groups for each in group["params"]} == {
        id(each) for each in module.model[2].parameters()
    }
    images = ImageFolder(folder, TO_FLOAT)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(accelerator="cpu", max_steps=3, **quiet)
    trainer.fit(module, DataLoader(images, batch_size=3))
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    loaded = lightning_module.Classifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    before, after = (torch.cat(trainer.predict(each, DataLoader(images, batch_size=9))) for each in (module, loaded))
    assert torch.equal(before, after)
    # Nothing but the ResNet has learned.
    shipped = normalize.state_dict()
    assert all(torch.equal(value, shipped[name]) for name, value in loaded.model[0].state_dict().items())
    batch = torch.stack([image for image, _ in images])
    with torch.no_grad():
        by_hand = loaded.model[2].eval()(standardize(normalize(batch), *IMAGENET)).softmax(dim=1)
    close(torch.Tensor(after), torch.Tensor(by_hand))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_numpy_function(dtype, normalize):
    needs("albumentations")
    from albumentations_transform import on_array

    tile = render_tile(3, 96)[:, :, :80]
    tensor = tile if dtype == np.uint8 else tile / 255
    image = tensor.permute(1, 2, 0).numpy()
    image.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = on_array(normalize, image)
        flipped = on_array(normalize.for_slide([tensor]), image[::-1, ::-1])
    assert out.dtype == dtype
    assert out.flags.c_contiguous
    close(torch.from_numpy(out).permute(2, 0, 1), normalize(tensor))
    np.testing.assert_allclose(flipped[::-1, ::-1], out, atol=1e-5 if dtype == np.float32 else 0)


class Arrays:
    """Images and masks as those write them who use Albumentations: the transform is called in the dataset."""

    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 4

    def __getitem__(self, index):
        image = render_tile(index, 64).permute(1, 2, 0).numpy()
        out = self.transform(image=image, mask=(image[..., 0] < 128).astype(np.uint8))
        return out["image"], out["mask"]


@pytest.mark.parametrize("workers", [0, 2])
def test_albumentations_in_a_loader(workers, normalize):
    A = needs("albumentations")  # noqa: N806
    from albumentations_transform import Stain

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform = A.Compose([Stain(), A.HorizontalFlip(p=1)])
    images, masks = next(iter(DataLoader(Arrays(transform), batch_size=4, num_workers=workers)))
    tiles = torch.stack([render_tile(index, 64) for index in range(4)])
    assert torch.equal(images.permute(0, 3, 1, 2), normalize(tiles).flip(-1))
    assert torch.equal(masks, (tiles[:, 0] < 128).to(torch.uint8).flip(-1))


def test_albumentations_boxes_and_serialization(tile, normalize):
    A = needs("albumentations")  # noqa: N806
    from albumentations_transform import Stain

    boxes = A.BboxParams(format="pascal_voc", label_fields=["labels"])
    transform = A.Compose([Stain(weights="camelyon17-center2"), A.VerticalFlip(p=1)], bbox_params=boxes)
    image = tile.permute(1, 2, 0).numpy()
    expected = NormalizeStain.pretrained("camelyon17-center2")(tile).flip(-2).permute(1, 2, 0).numpy()
    assert not np.array_equal(expected, normalize(tile).flip(-2).permute(1, 2, 0).numpy())
    for each in (transform, pickle.loads(pickle.dumps(transform)), A.from_dict(A.to_dict(transform))):
        out = each(image=image, bboxes=[(3, 4, 50, 60)], labels=[7])
        np.testing.assert_array_equal(out["image"], expected)
        np.testing.assert_allclose(out["bboxes"], [(3, 128 - 60, 50, 128 - 4)], atol=1e-4)
        assert list(out["labels"]) == [7]


def test_torchstain_and_ours_take_the_same_tile(tile, normalize):
    needs("torchstain")
    import from_torchstain

    image, target = to_pil_image(render_tile(5, 128, LABS["lab_c"])), to_pil_image(tile)
    theirs, ours = from_torchstain.by_torchstain(image, target), from_torchstain.by_stainnorm(image)
    assert (theirs.shape, theirs.dtype) == ((128, 128, 3), torch.int32)
    assert (ours.shape, ours.dtype) == ((3, 128, 128), torch.float32)
    assert theirs.max() > 1
    assert 0 <= ours.min() < ours.max() <= 1
    close(ours, normalize(unit(image)))
    # The same picture, in other colors: had either mixed up axes, structure would be lost.
    rows = torch.stack([(theirs.permute(2, 0, 1) / 255).mean(0).flatten(), ours.mean(0).flatten()])
    assert torch.corrcoef(rows)[0, 1] > 0.95

    blank = Image.new("RGB", (64, 64), "white")
    with pytest.raises(IndexError):
        from_torchstain.by_torchstain(blank, target)
    assert torch.equal(from_torchstain.by_stainnorm(blank), torch.ones(3, 64, 64))


def test_floats_to_255_come_back_unchanged(tile, normalize):
    with pytest.warns(UserWarning, match="divide by 255"):
        assert torch.equal(normalize(tile.float()), tile.float())


class TridentEncoder(nn.Module):
    """Has the transform that a TRIDENT encoder has, which its patch dataset calls with a PIL tile."""

    def __init__(self, transform: Callable) -> None:
        super().__init__()
        self.eval_transforms = transform


class ClamBag:
    """Items as those of CLAM's Whole_Slide_Bag_FP."""

    def __init__(self, tiles: list[Image.Image], img_transforms: Callable) -> None:
        self.tiles, self.img_transforms = tiles, img_transforms

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"img": self.img_transforms(self.tiles[index]), "coord": np.array([64 * index, 0])}


@dataclasses.dataclass(frozen=True)
class StampExtractor:
    """Has the fields of STAMP's Extractor."""

    model: nn.Module
    transform: Callable
    identifier: str


@pytest.fixture(scope="module")
def slide(folder):
    return sorted((folder / "lab_b").iterdir())


def own_transform():
    return v1.Compose([v1.Resize(32), v1.ToTensor(), v1.Normalize(*IMAGENET)])


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 5, stride=3), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()).eval()


def test_normalizer_in_trident_clam_and_stamp(slide, normalize):
    needs("timm")
    from embed_tiles import compose, for_slide

    tiles = open_all(slide)
    for normalizer in (normalize, for_slide(normalize, slide)):
        expected = [own_transform()(normalizer(tile)) for tile in tiles]

        trident = TridentEncoder(own_transform())
        trident.eval_transforms = compose(normalizer, trident.eval_transforms)
        assert all(torch.equal(trident.eval_transforms(tile), each) for tile, each in zip(tiles, expected, strict=True))

        bag = ClamBag(tiles, compose(normalizer, own_transform()))
        (batch,) = DataLoader(bag, batch_size=3, num_workers=1)
        assert torch.equal(batch["img"], torch.stack(expected))
        assert batch["coord"].tolist() == [[0, 0], [64, 0], [128, 0]]

        plain = StampExtractor(model=encoder(), transform=own_transform(), identifier="vit")
        extractor = dataclasses.replace(plain, transform=compose(normalizer, plain.transform), identifier="vit-stain")
        assert extractor.identifier != plain.identifier
        assert torch.equal(extractor.transform(tiles[0]), expected[0])
        assert not torch.equal(plain.transform(tiles[0]), expected[0])


def test_embeddings_per_tile_and_per_slide(slide, normalize):
    needs("timm")
    from embed_tiles import compose, embed, for_slide

    # Against hand: the slide's map is one, as estimated from all its tiles at once.
    batch = torch.stack([pil_to_tensor(tile) for tile in open_all(slide)])
    fixed = for_slide(normalize, slide)
    close(fixed.fixed_map, normalize.for_slide(batch).fixed_map, 1e-3)
    assert torch.equal(fixed.estimate_map(batch), fixed.fixed_map.expand(3, 2, 4))
    assert normalize.estimate_map(batch).unique(dim=0).shape == (3, 2, 4)
    assert normalize.estimate_offset(batch).unique(dim=0).shape == (3, 3)

    model, own = encoder(), own_transform()
    found = {}
    for name, normalizer in {"tile": normalize, "slide": fixed}.items():
        none, two = (embed(model, slide, compose(normalizer, own), workers) for workers in (0, 2))
        assert torch.equal(none, two)
        close(none, torch.cat([model(own(normalizer(tile))[None]) for tile in open_all(slide)]).detach())
        found[name] = none
    assert (found["tile"] - found["slide"]).abs().amax(dim=1).min() > 1e-5


def test_slides_of_two_centers_come_closer(data, normalize):
    """What the recipe is for, on real tiles of a pink and a blue center, in plain mean colors."""
    needs("timm")
    from embed_tiles import compose, embed, for_slide

    slides = [sorted((data / "camelyon17" / f"center_{center}").glob("*.png")) for center in (1, 2)]
    to_small = v1.Compose([v1.Resize(64), v1.ToTensor()])
    mean_color = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before, after = (
        [embed(mean_color, paths, transform(paths)).mean(dim=0) for paths in slides]
        for transform in (lambda paths: to_small, lambda paths: compose(for_slide(normalize, paths), to_small))
    )
    chroma = [[color - color.mean() for color in colors] for colors in (before, after)]
    assert (chroma[1][0] - chroma[1][1]).norm() < 0.5 * (chroma[0][0] - chroma[0][1]).norm()


COMMANDS = {
    "finetune_resnet": ("torch", r"epoch 3: held-out accuracy (\S+)\n.*read back: held-out accuracy \1\n"),
    "timm_model": ("timm", r"at least: 0\.99"),
    "monai_pipeline": ("monai", r"lab_c/tile_2.png: MetaTensor \(3, 256, 256\)"),
    "lightning_module": ("lightning", r"differ by at most 0\.0e\+00"),
    "albumentations_transform": ("albumentations", r"(?s)else as it was: True.*perturbed.*else as it was: True"),
    "torchvision_pipeline": ("torchvision", r"(?s)epoch 0: mean .*epoch 1: mean .*% masked, boxes \[\["),
    "multi_crop": ("torchvision", r"(global crop \(3, 224, 224\): .*\n){2}(local crop \(3, 96, 96\): .*\n){4}$"),
    "from_torchstain": ("torchstain", r"blank tile, stainnorm_transform: \(3, 256, 256\) torch.float32, 1 to 1"),
    "embed_tiles": ("timm", r"as_scanned: .*\nper_tile: .*\nper_slide: "),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.filterwarnings("ignore")
def test_command_of_the_docstring(name, tmp_path, monkeypatch, capsys):
    needed, printed = COMMANDS[name]
    needs(needed)
    example = importlib.import_module(name)
    (command,) = [line for line in example.__doc__.splitlines() if line.startswith("python ")]
    _, script, *arguments = shlex.split(command)
    assert script == f"examples/{name}.py"
    if "--out" in arguments:
        arguments[arguments.index("--out") + 1] = str(tmp_path / "out")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    example.main()
    assert re.search(printed, capsys.readouterr().out)
    assert any(tmp_path.iterdir()) == ("--out" in arguments)


@pytest.mark.parametrize("library", ["tiatoolbox", "wsidata", "large_image_source_openslide", "openslide"])
def test_libraries_that_open_slides_read_them_normalized(tmp_path, monkeypatch, capsys, library):
    pytest.importorskip(library, reason=f'needs {library}: pip install -e ".[readers]" or tiatoolbox')
    read_normalized = importlib.import_module("read_normalized")
    path = make_slide(tmp_path / "a.svs", tissue(1100, 1500))
    monkeypatch.setattr(read_normalized, "READERS", {library: read_normalized.READERS[library]})
    monkeypatch.setattr(sys, "argv", ["read_normalized.py", str(path), "--tiles", "9"])
    read_normalized.main()
    assert capsys.readouterr().out.splitlines()[-1] == f"{library}: 9 tiles, off by 0"
