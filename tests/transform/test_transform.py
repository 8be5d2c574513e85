import copy
import dataclasses
import io
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from camelyon17 import read
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia.color import rgb_to_lab
from PIL import Image
from render_tiles import render_tile
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.models import resnet50
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from stainnorm_transform import ColorNormNet, NormalizeStain, PerturbStain
from stainnorm_transform import transform as transform_module
from stainnorm_transform.color import as_map, shift_ab
from stainnorm_transform.estimate import map_of, mean_terms, offset_of, tissue_sums
from stainnorm_transform.network import FrozenColorNormNet

KINDS = ["NormalizeStain", "fixed map", "PerturbStain"]
COLOR_MAP = torch.tensor([[25.0, 4.0, -3.0, 2.0], [-25.0, 1.0, 5.0, -4.0]])
OTHER_MAP = torch.tensor([[-15.0, -2.0, 6.0, 0.0], [25.0, 3.0, 0.0, 4.0]])


@pytest.fixture(params=KINDS)
def transform(request, random_normalize):
    if request.param == "fixed map":
        return random_normalize.for_slide([render_tile()])
    return random_normalize if request.param == "NormalizeStain" else PerturbStain(20)


def test_pil_images_equal_tensors_and_keep_their_info(random_normalize, tile):
    image = to_pil_image(tile)
    image.info.update(dpi=(300, 300), icc_profile=b"profile")
    out = random_normalize(image)
    assert isinstance(out, Image.Image)
    assert (out.mode, out.size, out.info) == ("RGB", image.size, image.info)
    assert torch.equal(pil_to_tensor(out), random_normalize(tile))
    assert torch.equal(pil_to_tensor(image), tile)


@pytest.mark.parametrize("size", [(64, 64), (97, 63), (300, 260)])
def test_a_uint8_batch_equals_its_images_bit_for_bit(random_normalize, size):
    images = torch.stack([render_tile(seed, 300)[:, : size[0], : size[1]] for seed in range(5)])
    images[2] = 255
    assert torch.equal(random_normalize(images), torch.stack([random_normalize(image) for image in images]))


def test_takes_away_what_it_estimates(random_normalize, tile):
    image = tile / 255
    offset = random_normalize.estimate_offset(image)
    assert offset.shape == (3,)
    assert offset[1:].abs().min() > 0.1
    color_map = random_normalize.estimate_map(image)
    assert color_map.shape == (2, 4)
    assert color_map.ne(0).all()
    assert torch.equal(random_normalize(image), shift_ab(image, -color_map))
    images = torch.stack([image, image.flip(-1), torch.ones_like(image)])
    maps = random_normalize.estimate_map(images)
    assert maps.shape == (3, 2, 4)
    assert torch.equal(random_normalize(images), shift_ab(images, -maps))
    assert torch.equal(random_normalize.estimate_map(to_pil_image(tile)), random_normalize.estimate_map(tile))


def test_samples_keep_masks_boxes_and_labels(transform, tile):
    sample = {
        "image": tv_tensors.Image(tile),
        "nested": [tv_tensors.Mask(torch.ones(128, 128)), ("tumor", 7)],
        "boxes": tv_tensors.BoundingBoxes(torch.tensor([[1, 2, 3, 4]]), format="XYXY", canvas_size=(128, 128)),
        "label": torch.tensor(1),
    }
    out = transform(sample)
    assert not torch.equal(out["image"], tile)
    assert out["nested"][0] is sample["nested"][0]
    assert out["nested"][1] == ("tumor", 7)
    assert out["boxes"] is sample["boxes"]
    assert out["label"] is sample["label"]
    image, label = transform(tile, torch.tensor(3))
    assert image.shape == tile.shape
    assert label == 3


@dataclasses.dataclass
class Meta:
    slide: str


def test_whatever_else_a_sample_holds_passes_through(transform, tile):
    rest = {
        "text": "slide 7",
        "bytes": b"x",
        "none": None,
        "number": 0.5,
        "array": np.arange(3),
        "path": Path("a.png"),
        "object": Meta("a"),
        "tensor": torch.rand(3, 4, 4),
        "mask": tv_tensors.Mask(torch.ones(2, 128, 128, dtype=torch.bool)),
        "boxes": tv_tensors.BoundingBoxes(torch.tensor([[1, 2, 3, 4]]), format="XYXY", canvas_size=(128, 128)),
    }
    if hasattr(tv_tensors, "KeyPoints"):  # torchvision 0.23
        rest["points"] = tv_tensors.KeyPoints(torch.tensor([[5.0, 6.0]]), canvas_size=(128, 128))
    for image in (to_pil_image(tile), tv_tensors.Image(tile)):
        sample = {"rest": rest, "deep": ({"images": [image]},)}
        out = transform(sample)
        assert list(out) == list(sample)
        assert out["rest"].keys() == rest.keys()
        for name, value in rest.items():
            assert out["rest"][name] is value, name
        assert type(out["deep"][0]["images"][0]) is type(image)
    out, mask, *others = transform(to_pil_image(tile), rest["mask"], 3, "x")
    assert isinstance(out, Image.Image)
    assert mask is rest["mask"]
    assert others == [3, "x"]


def test_images_of_several_kinds_in_one_sample(random_normalize, tile):
    pil, image, video = random_normalize((to_pil_image(tile), tv_tensors.Image(tile), tv_tensors.Video(tile[None])))
    expected = random_normalize(tile)
    assert torch.equal(pil_to_tensor(pil), expected)
    assert torch.equal(image, expected)
    assert torch.equal(video[0], expected)


def test_of_plain_tensors_only_the_first_is_an_image_and_none_beside_others(random_normalize, tile):
    """torchvision's rule; the README says what to do."""
    other = render_tile(3, 128)
    expected = [random_normalize(image) for image in (tile, other)]
    for sample in ((tile, other), {"a": tile, "b": other}):
        first, second = random_normalize(sample).values() if isinstance(sample, dict) else random_normalize(sample)
        assert torch.equal(first, expected[0])
        assert second is other
    for image in (tv_tensors.Image(tile), to_pil_image(tile)):
        assert random_normalize((other, image))[0] is other
    wrapped = random_normalize((tv_tensors.Image(tile), tv_tensors.Image(other)))
    assert all(map(torch.equal, wrapped, expected))


@pytest.mark.parametrize("version", [v1, v2])
def test_inside_of_other_transforms(random_normalize, tile, version):
    expected = random_normalize(tile)
    always, never = (version.RandomApply([random_normalize], p=p) for p in (1.0, 0.0))
    assert torch.equal(always(tile), expected)
    assert torch.equal(never(tile), tile)
    for inside in (version.RandomChoice([random_normalize]), version.RandomOrder([random_normalize])):
        assert torch.equal(inside(tile), expected)
    nested = version.Compose([version.Compose([version.RandomHorizontalFlip(p=0), random_normalize])])
    assert torch.equal(nested(tile), expected)
    assert "NormalizeStain(target='random'" in repr(nested)


def test_by_key_and_as_a_function(random_normalize, tile):
    assert torch.equal(v2.Lambda(random_normalize)(tile), random_normalize(tile))
    apart = v2.Compose(
        [v2.ToImage(), random_normalize, v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
    )
    out = apart({"image": to_pil_image(tile), "mask": tv_tensors.Mask(tile[:1])})
    torch.testing.assert_close(out["image"].as_subclass(torch.Tensor), random_normalize(tile) / 255)
    assert torch.equal(out["mask"], tile[:1])


class PilTiles(torch.utils.data.Dataset):
    """Like torchvision.datasets.ImageFolder: (PIL image, label), the transform on the image."""

    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.transform(to_pil_image(render_tile(index))), index


@pytest.mark.parametrize("version", [v1, v2])
@pytest.mark.filterwarnings("ignore:The transform `ToTensor:UserWarning")  # of v2, and still in wide use
def test_in_compose_on_pil_images_in_a_data_loader(random_normalize, version):
    compose = version.Compose([random_normalize, version.ToTensor()])
    loader = DataLoader(PilTiles(compose), batch_size=2, num_workers=2)
    batches = list(loader)
    assert [labels.tolist() for _, labels in batches] == [[0, 1], [2, 3]]
    expected = torch.stack([random_normalize(render_tile(index)) for index in range(4)]) / 255
    assert torch.equal(torch.cat([images for images, _ in batches]), expected)


def test_in_compose_with_labels(transform, tile):
    image, label = v2.Compose([v2.ToImage(), transform])(to_pil_image(tile), 3)
    assert (image.shape, label) == ((3, 128, 128), 3)


def train_all(model, batch):
    model.train()
    for module in model.modules():
        module.train()


def unfreeze_and_step(model, batch):
    model.requires_grad_(True)
    for parameter in model.parameters():
        parameter.requires_grad = True
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    model(batch).mean().backward()
    optimizer.step()


def initialize(model, batch):
    def reset(module):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        for name in ("weight", "bias"):
            if getattr(module, name, None) is not None:
                nn.init.constant_(getattr(module, name), 3.0)

    model.apply(reset)
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear | nn.modules.batchnorm._NormBase):
            reset(module)


def prune_all(model, batch):
    layers = [(module, "weight") for module in model.modules() if getattr(module, "weight", None) is not None]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.9)
    for module, name in layers:
        prune.remove(module, name)


def update_batch_norm(model, batch):
    torch.optim.swa_utils.update_bn([batch], model)


@pytest.mark.parametrize("change", [train_all, unfreeze_and_step, initialize, prune_all, update_batch_norm])
def test_is_frozen_whatever_is_done_to_the_model(random_normalize, tile, change):
    model = nn.Sequential(random_normalize, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    batch = (tile / 255).expand(2, -1, -1, -1)
    expected, behind = random_normalize(batch), copy.deepcopy(model[1:].state_dict())
    change(model, batch)
    model(batch)
    assert torch.equal(random_normalize(batch), expected)
    assert any(not torch.equal(value, behind[name]) for name, value in model[1:].state_dict().items())


def test_a_network_of_buffers_computes_what_the_layers_do(random_network):
    frozen = FrozenColorNormNet(random_network)
    assert not list(frozen.children())
    assert not list(frozen.parameters())
    lab = 50 * torch.rand(2, 3, 20, 31)
    torch.testing.assert_close(frozen(lab), random_network(lab), atol=1e-5, rtol=0)


def other_state() -> NormalizeStain:
    return NormalizeStain(ColorNormNet(), preserve_white=False, slopes=False, target="other", recipe="none")


def test_a_state_holds_all_that_decides_the_output(random_normalize, tile):
    for assign in (False, True):
        model = nn.Sequential(other_state(), nn.Linear(1, 1))
        model.load_state_dict(nn.Sequential(random_normalize, nn.Linear(1, 1)).state_dict(), assign=assign)
        assert torch.equal(model[0](tile), random_normalize(tile))
        assert repr(model[0]) == repr(random_normalize)
    uniform = other_state()
    random_normalize.load_state_dict(uniform.state_dict())
    assert torch.equal(random_normalize(tile), uniform(tile))
    assert not random_normalize.preserve_white
    assert not random_normalize.slopes


def test_a_state_without_a_part_is_refused(random_normalize):
    for missing in random_normalize.state_dict():
        state = {name: value for name, value in random_normalize.state_dict().items() if name != missing}
        with pytest.raises(RuntimeError, match="Missing key"):
            other_state().load_state_dict(state)


def test_a_state_is_loaded_as_float32(random_normalize, tile):
    """One of model.half(), say, whose own buffers a program had converted."""
    slide = random_normalize.for_slide([tile])
    half = {name: value.half() if value.is_floating_point() else value for name, value in slide.state_dict().items()}
    for assign in (False, True):
        loaded = other_state()
        loaded.load_state_dict(half, assign=assign)
        assert {buffer.dtype for buffer in loaded.buffers()} == {torch.float32}
        torch.testing.assert_close(loaded(tile / 255), slide(tile / 255), atol=1e-3, rtol=0)


def test_states_that_are_averaged_or_damaged(random_normalize, tile):
    state = random_normalize.state_dict()
    mean = other_state()
    mean.load_state_dict({name: (value.float() + value) / 2 for name, value in state.items()})
    assert torch.equal(mean(tile), random_normalize(tile))
    without_slopes = b'{"preserve_white": true, "target": "x", "recipe": ""}'
    for damaged in (b"x", b"{}", b"[1]", without_slopes):
        other = other_state()
        with pytest.raises(RuntimeError, match="is not that of a NormalizeStain"):
            other.load_state_dict({**state, "_extra_state": torch.tensor(list(damaged), dtype=torch.uint8)})
        assert (other.target, other.preserve_white, other.slopes) == ("other", False, False)


def test_copies_made_in_inference_mode_pass_gradients(random_normalize, tile):
    with torch.inference_mode():
        slide = random_normalize.for_slide([tile])
        copied = NormalizeStain(random_normalize.network)
    for made in (slide, copied):
        image = (tile / 255).requires_grad_()
        made(image).sum().backward()
        assert image.grad.isfinite().all()
        made.load_state_dict(made.state_dict())


def test_a_state_without_pickle(random_normalize, tile, tmp_path):
    safetensors.torch.save_file(random_normalize.state_dict(), tmp_path / "state.safetensors")
    loaded = other_state()
    loaded.load_state_dict(safetensors.torch.load_file(tmp_path / "state.safetensors"))
    assert torch.equal(loaded(tile), random_normalize(tile))


def state_of_0_1_0(network, offset=None):
    """With names of layers, an offset where one is fixed, and nothing else."""
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    return state if offset is None else {**state, "offset": offset}


def test_names_of_layers_in_a_state(random_network, random_normalize, tile):
    """Those of version 0.1.0."""
    loaded = other_state()
    loaded.load_state_dict(state_of_0_1_0(random_network))
    uniform = NormalizeStain(random_network, preserve_white=False)
    torch.testing.assert_close(loaded.estimate_offset(tile), uniform.estimate_offset(tile))
    # As maps have slopes in a new transform, but not in what version 0.1.0 did.
    loaded = NormalizeStain(ColorNormNet(), target="new")
    loaded.load_state_dict(state_of_0_1_0(random_network))
    offset = random_normalize.estimate_offset(tile)
    torch.testing.assert_close(loaded.estimate_offset(tile), offset)
    torch.testing.assert_close(loaded.estimate_map(tile), as_map(offset[1:]))
    assert (loaded.target, loaded.preserve_white, loaded.slopes) == ("new", True, False)


@pytest.mark.parametrize("assign", [False, True])
def test_an_offset_in_a_state_of_version_0_1_0_is_a_fixed_map(random_network, random_normalize, tile, assign):
    offset = torch.tensor([1.0, 12.0, -9.0])
    state = state_of_0_1_0(random_network, offset)
    before = dict(state)
    model = nn.Sequential(NormalizeStain(ColorNormNet()), nn.Linear(1, 1))
    whole = {**{f"0.{name}": value for name, value in state.items()}, **model[1].state_dict(prefix="1.")}
    model.load_state_dict(whole, assign=assign)
    loaded = NormalizeStain(ColorNormNet())
    loaded.load_state_dict(state, assign=assign)
    for transform in (model[0], loaded):
        assert torch.equal(transform.fixed_map, as_map(offset[1:]))
        assert torch.equal(transform(tile), shift_ab(tile, -offset[1:]))
    assert state.keys() == before.keys()
    # And what is saved of it is a state of today.
    again = other_state()
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(again(tile), loaded(tile))
    assert "offset" not in loaded.state_dict()


def test_made_without_memory_and_filled_later(random_normalize, tile):
    with torch.device("meta"):
        model = nn.Sequential(NormalizeStain.pretrained(), nn.Linear(1, 1))
    model = model.to("meta")
    assert model[0](tile.to("meta")).shape == tile.shape
    state = nn.Sequential(random_normalize, nn.Linear(1, 1)).state_dict()
    for filled, assign in ((copy.deepcopy(model).to_empty(device="cpu"), False), (model, True)):
        filled.load_state_dict(state, assign=assign)
        assert torch.equal(filled[0](tile), random_normalize(tile))


def test_a_leaf_for_torch_fx(random_normalize, tile):
    model = nn.Sequential(random_normalize, nn.Conv2d(3, 4, 3)).eval()
    image = tile[None] / 255
    extractor = create_feature_extractor(model, ["0", "1"])
    assert torch.equal(extractor(image)["0"], random_normalize(image))
    assert torch.equal(extractor(image)["1"], model(image))
    with pytest.raises(TypeError, match=r"a leaf for torch\.fx: trace the model that it is in"):
        torch.fx.symbolic_trace(random_normalize)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "build",
    [
        lambda model, image: torch.jit.trace(model, image),
        lambda model, image: torch.jit.script(model),
        lambda model, image: torch.onnx.export(model, (image,), io.BytesIO(), dynamo=False),
    ],
)
def test_torchscript_is_refused(random_normalize, tile, build):
    with pytest.raises(RuntimeError, match=r"TorchScript is not supported.*use torch\.export\.export, or torch\.onnx"):
        build(nn.Sequential(random_normalize), tile[None] / 255)


@pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning")  # by torch 2.6
def test_exported_without_a_wrapper(random_normalize, tile):
    image = (tile[None] / 255).expand(2, -1, -1, -1)
    # Not strict, as is the default since torch 2.9.
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(random_normalize, (image,), dynamic_shapes=shapes, strict=False)
    more = torch.cat([image, image.flip(-1)])
    torch.testing.assert_close(program.module()(more), random_normalize(more), atol=1e-4, rtol=0)


def test_values_outside_are_cut(random_normalize, tile):
    image = tile / 255
    image[:, 0, :5] = torch.tensor([-torch.inf, torch.inf, 1.2, -0.1, 0.5])
    slide = random_normalize.for_slide([tile])
    for transform in (random_normalize, slide):
        for with_gradient in (False, True):
            out = transform(image.clone().requires_grad_(with_gradient)).detach()
            torch.testing.assert_close(out, transform(image.clamp(0, 1)), atol=1e-5, rtol=0)


def test_the_network_that_was_given_is_not_touched():
    network = ColorNormNet().train()
    NormalizeStain(network)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_as_the_first_layer_of_a_resnet_forward_and_backward(tile):
    model = nn.Sequential(NormalizeStain.pretrained(), resnet50()).train()
    image = torch.stack([tile, tile.flip(-1)])[..., :64, :64] / 255
    image.requires_grad_()
    out = model(image)
    assert out.shape == (2, 1000)
    out.sum().backward()
    assert image.grad.isfinite().all()
    assert image.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradient_to_the_input_is_right(random_normalize):
    tile = render_tile(size=12).double() / 255
    fixed = random_normalize.for_slide([render_tile()])
    image = (0.1 + 0.8 * tile).requires_grad_()
    assert torch.autograd.gradcheck(fixed, image)


def test_computes_in_float32_under_autocast_and_half(random_normalize, tile):
    image = tile / 255
    expected = random_normalize(image)
    slide, color_map = random_normalize.for_slide([image]), random_normalize.estimate_map(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(random_normalize(image), expected)
        assert torch.equal(random_normalize.estimate_map(image), color_map)
        assert torch.equal(random_normalize.for_slide([image]).fixed_map, slide.fixed_map)
    halved = nn.Sequential(copy.deepcopy(random_normalize)).half()
    assert torch.equal(halved(image), expected)
    assert halved(image.half()).dtype == torch.float16


def test_computes_in_float32_whatever_the_default_dtype(random_normalize, random_network, tile):
    torch.set_default_dtype(torch.float64)
    try:
        normalize = NormalizeStain(random_network.double())
        assert {buffer.dtype for buffer in normalize.buffers()} == {torch.float32}
        odd = tile.repeat(1, 2, 2)[:, :217, :200]
        for image in (tile, odd):
            assert torch.equal(normalize(image), random_normalize(image))
    finally:
        torch.set_default_dtype(torch.float32)


def test_compiles_without_graph_break(random_normalize, tile):
    model = nn.Sequential(random_normalize, nn.Conv2d(3, 4, 3))
    image = (tile / 255).expand(2, -1, -1, -1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image), model(image), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_compiles_for_every_size(random_normalize):
    torch._dynamo.reset()
    compiled = torch.compile(random_normalize, fullgraph=True, backend="eager")
    # Sizes are symbols from the second size on.
    for size in (96, 300, 400, 1200):
        image = torch.rand(2, 3, size, size + 1)
        torch.testing.assert_close(compiled(image), random_normalize(image), atol=1e-4, rtol=0)


def test_for_slide_is_one_map_for_all(random_normalize):
    tiles = [render_tile(seed, size) for seed, size in enumerate((64, 128, 100))]
    blank = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    slide = random_normalize.for_slide([*tiles, blank, to_pil_image(tiles[0])])
    sums = sum(tile[0].numel() * tissue_sums(random_normalize.network, tile) for tile in (*tiles, tiles[0]))
    torch.testing.assert_close(slide.fixed_map, map_of(sums), atol=1e-4, rtol=1e-5)
    offsets = torch.stack([random_normalize.estimate_offset(tile) for tile in tiles])
    low, high = offsets[:, 1:].min(dim=0).values, offsets[:, 1:].max(dim=0).values
    at_the_mean = slide.fixed_map @ mean_terms(sums)
    torch.testing.assert_close(at_the_mean, offset_of(sums), atol=1e-4, rtol=0)
    assert ((at_the_mean >= low) & (at_the_mean <= high)).all()
    pair = torch.stack([tiles[0]] * 2)
    assert torch.equal(slide.estimate_map(pair), slide.fixed_map.expand(2, 2, 4))
    assert torch.equal(slide(pair), shift_ab(pair, -slide.fixed_map))
    fixed = random_normalize.with_offset(torch.tensor([0.0, 3.0, -4.0]))
    assert torch.equal(fixed.estimate_offset(pair), torch.tensor([0.0, 3.0, -4.0]).expand(2, 3))
    wide = render_tile(7, 256)
    halves = torch.cat([slide(wide[..., :100]), slide(wide[..., 100:])], dim=-1)
    assert torch.equal(slide(wide), halves)
    same = random_normalize.for_slide(torch.stack([tiles[1]] * 3))
    torch.testing.assert_close(same.fixed_map, random_normalize.estimate_map(tiles[1]), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(same.estimate_offset(tiles[1]), random_normalize.estimate_offset(tiles[1]))


def test_fixed_by_a_map_or_an_offset_and_not_by_what_was_fixed_before(random_normalize, tile):
    by_map, by_offset = (
        random_normalize.with_map(COLOR_MAP),
        random_normalize.with_offset(torch.tensor([9.0, 25.0, -25.0])),
    )
    assert torch.equal(by_map(tile), shift_ab(tile, -COLOR_MAP))
    assert torch.equal(by_offset(tile), shift_ab(tile, torch.tensor([-25.0, 25.0])))
    assert torch.equal(by_offset.fixed_map, as_map(torch.tensor([25.0, -25.0])))
    for fixed in (by_map, by_offset, by_map.for_slide([tile])):
        assert (fixed.target, fixed.preserve_white, fixed.slopes) == ("random", True, True)
    assert torch.equal(by_map.for_slide([tile]).fixed_map, random_normalize.for_slide([tile]).fixed_map)
    assert random_normalize.fixed_map is None
    kept = COLOR_MAP.clone()
    made = random_normalize.with_map(kept)
    kept.zero_()
    assert torch.equal(made.fixed_map, COLOR_MAP)


def test_for_slide_takes_dicts_with_an_image(random_normalize):
    tiles = torch.stack([render_tile(seed, 64) for seed in range(3)])
    expected = random_normalize.for_slide(tiles).fixed_map
    samples = [{"image": tile, "x": 0} for tile in tiles]
    batch = {"x": 0, "image": tiles}
    for every in (samples, [batch], DataLoader(samples, batch_size=2), batch):
        torch.testing.assert_close(random_normalize.for_slide(every).fixed_map, expected, atol=1e-4, rtol=1e-5)


def test_a_fixed_map_soon_has_a_table_and_nothing_else_changes(monkeypatch, tile):
    monkeypatch.setattr(transform_module, "TABLE_SIZE", 20_000)
    slide = NormalizeStain(ColorNormNet(), fixed_map=COLOR_MAP)
    expected = slide(tile)
    assert not transform_module._tables
    assert torch.equal(slide(tile), expected)
    assert len(transform_module._tables) == 1
    torch.testing.assert_close(slide(tile / 255), expected / 255, atol=0.6 / 255, rtol=0)
    assert torch.equal(pil_to_tensor(slide(to_pil_image(tile))), expected)
    assert len(pickle.dumps(slide)) < 50_000
    assert torch.equal(copy.deepcopy(slide)(tile), expected)
    assert not any(tensor.numel() > 10_000 for tensor in slide.state_dict().values())


def test_slides_share_a_few_tables(monkeypatch, tile):
    monkeypatch.setattr(transform_module, "TABLE_SIZE", 20_000)
    slides = [NormalizeStain(ColorNormNet(), fixed_map=number * COLOR_MAP) for number in range(3)]
    for slide in slides:
        for _ in range(2):
            torch.testing.assert_close(slide(tile), shift_ab(tile, -slide.fixed_map), atol=1, rtol=0)
    assert len(transform_module._tables) == transform_module._TABLES
    tables = list(transform_module._tables.values())
    copy.deepcopy(slides[-1])(tile)
    assert [*map(id, transform_module._tables.values())] == [*map(id, tables)]


def test_the_table_is_made_anew_when_map_or_white_change(monkeypatch, tile):
    monkeypatch.setattr(transform_module, "TABLE_SIZE", 10)
    slide = NormalizeStain(ColorNormNet(), fixed_map=COLOR_MAP)
    other = NormalizeStain(slide.network, fixed_map=OTHER_MAP)
    first = slide(tile)
    slide.load_state_dict(other.state_dict())
    assert torch.equal(slide(tile), shift_ab(tile, -OTHER_MAP))
    slide.preserve_white = False
    assert torch.equal(slide(tile), shift_ab(tile, -OTHER_MAP, preserve_white=False))
    assert not torch.equal(slide(tile), first)


def test_for_slide_wants_tiles(random_normalize):
    for nothing in ([], [torch.zeros(0, 3, 64, 64)]):
        with pytest.raises(ValueError, match="at least one tile, got none"):
            random_normalize.for_slide(nothing)
    for one in (render_tile(), to_pil_image(render_tile()), {"image": render_tile()}):
        with pytest.raises(TypeError, match="got one image: put it in a list"):
            random_normalize.for_slide(one)
    with pytest.raises(TypeError, match="images or batches of images, got tuple"):
        random_normalize.for_slide([(render_tile(), 1)])
    with pytest.raises(TypeError, match="a dict with an image under 'image', got the keys 'tile'"):
        random_normalize.for_slide([{"tile": render_tile()}])


def test_what_is_done_to_an_estimate_stays_outside(random_normalize, tile):
    slide = random_normalize.for_slide([tile])
    before = slide.fixed_map.clone()
    slide.estimate_offset(tile).mul_(2)
    slide.estimate_map(tile).mul_(2)
    slide.estimate_map(tile[None]).mul_(2)
    assert torch.equal(slide.fixed_map, before)


def test_white_glass_stays(data, random_normalize):
    slide = NormalizeStain(ColorNormNet(), fixed_map=COLOR_MAP)
    image = read(data / "edge_cases/almost-white-2.png")
    white = rgb_to_lab(image / 255)[0] > 97
    assert white.float().mean() > 0.1
    assert torch.equal(slide(image)[:, white], image[:, white])
    assert not torch.equal(slide(image), image)


def test_for_slide_without_tissue_changes_nothing(random_normalize, tile):
    slide = random_normalize.for_slide([torch.full((3, 64, 64), 255, dtype=torch.uint8)])
    assert torch.equal(slide(tile), tile)


def test_repr_tells_target_and_recipe(random_normalize):
    random_normalize.recipe = "iterations=10"
    text = repr(random_normalize.for_slide([render_tile()]))
    assert text.startswith("NormalizeStain(target='random', preserve_white=True, fixed_map=[[")
    assert text.endswith("recipe='iterations=10')")
    text = repr(NormalizeStain(ColorNormNet(), fixed_map=OTHER_MAP))
    assert "fixed_map=[[-15.00, -2.00, 6.00, 0.00], [25.00, 3.00, 0.00, 4.00]]" in text


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (torch.zeros(4, 64, 64), ValueError, r"shape \(\.\.\., 3, H, W\).*\(4, 64, 64\)"),
        (torch.zeros(64, 64), ValueError, r"\(64, 64\)"),
        (torch.zeros(3, 0, 64), ValueError, r"\(3, 0, 64\)"),
        (torch.zeros(3, 64, 64, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(3, 64, 64, dtype=torch.int16), TypeError, "int16"),
        (Image.new("L", (8, 8)), ValueError, "mode RGB, got L"),
        (Image.new("RGBA", (8, 8)), ValueError, "mode RGB, got RGBA"),
        (np.zeros((8, 8, 3), np.uint8), TypeError, "expected a PIL image or an image tensor.*ndarray"),
        (torch.zeros(64, 64, 3), ValueError, r"\(64, 64, 3\): channels come first"),
        ({"label": 3}, TypeError, "got int"),
    ],
)
def test_bad_input(transform, sample, error, message):
    with pytest.raises(error, match=message):
        transform(sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image * 255, "above 2, which are cut to it: divide by 255"),
        (v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), "below 0.*: normalize stains before v2.Norm"),
        (lambda image: 2 * (image * 0.8 + 0.15) - 1, "below 0.*: normalize stains before v2.Norm"),  # pale
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_range_that_cannot_be_right_is_warned_of_once(random_normalize, tile, change, message, dtype):
    images = torch.stack([tile, tile.flip(-1)]) / 255
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for image in (images[0], images, images * 0.9):
            random_normalize(change(image).to(dtype))
        random_normalize((images * 1.4).to(dtype))  # a filter that overshoots, and more
        random_normalize(torch.full_like(images, torch.nan))
        random_normalize(tile)
    assert {warning.filename for warning in caught} == {__file__}
    texts = {str(warning.message) for warning in caught}
    assert any(re.search(message, text) for text in texts)
    assert len(caught) == len(texts) <= 2


def test_a_state_says_whether_the_map_is_fixed(random_normalize, tile):
    slide = random_normalize.for_slide([render_tile(3)])
    for one, other in ((slide, random_normalize), (random_normalize, slide)):
        models = [nn.Sequential(copy.deepcopy(each), nn.Linear(1, 1)) for each in (one, other)]
        models[1].load_state_dict(models[0].state_dict(), strict=True)
        assert torch.equal(models[1][0](tile), one(tile))
    before = slide(tile)
    slide.load_state_dict({}, strict=False)
    assert torch.equal(slide(tile), before)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"ColorNormNet, and no other class, got str: pretrained\(\) takes a name"):
        NormalizeStain("camelyon17")
    with pytest.raises(TypeError, match="positional argument"):
        NormalizeStain(ColorNormNet(), True, "lab")


@pytest.mark.parametrize(
    ("color_map", "error", "message"),
    [
        (torch.zeros(2), ValueError, r"one map of shape \(2, 4\), got \(2,\)"),
        (torch.zeros(3), ValueError, r"one map of shape \(2, 4\), got \(3,\)"),
        (torch.zeros(2, 2, 4), ValueError, r"got \(2, 2, 4\)"),
        ([[0.0] * 4] * 2, TypeError, "map to be a tensor, got list"),
        (torch.full((2, 4), torch.nan), ValueError, "a finite map, got"),
        (torch.full((2, 4), torch.inf), ValueError, "a finite map, got"),
    ],
)
def test_bad_maps(random_normalize, color_map, error, message):
    with pytest.raises(error, match=message):
        NormalizeStain(ColorNormNet(), fixed_map=color_map)
    with pytest.raises(error, match=message):
        random_normalize.with_map(color_map)


@pytest.mark.parametrize(
    ("offset", "error", "message"),
    [
        (torch.zeros(2), ValueError, r"one offset of shape \(3,\), got \(2,\)"),
        (torch.zeros(2, 4), ValueError, r"one offset of shape \(3,\), got \(2, 4\)"),
        ([0, 1, 2], TypeError, "offset to be a tensor, got list"),
        (torch.tensor([0.0, torch.nan, 1.0]), ValueError, "a finite offset, got"),
    ],
)
def test_bad_offsets(random_normalize, offset, error, message):
    with pytest.raises(error, match=message):
        random_normalize.with_offset(offset)


def test_bad_arguments_of_perturb_stain():
    for value in (-1, -0.01, 128.5, 1e39, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"max_offset from 0 to 128 Lab units, got {re.escape(str(value))}"):
            PerturbStain(value)
    with pytest.raises(TypeError, match=r"True or False for preserve_white, got 0\.1"):
        PerturbStain(20, 0.1)
    for value in (False, "20", None):
        with pytest.raises(TypeError, match=f"a number for max_offset, got {type(value).__name__}"):
            PerturbStain(value)


@given(max_offset=st.floats(0, 15), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_perturb_shifts_tissue_by_at_most_max_offset(max_offset, seed):
    torch.manual_seed(seed)
    image = render_tile(size=32).double() / 255
    perturbed = PerturbStain(max_offset)(image)
    inside = ((perturbed > 1e-6) & (perturbed < 1 - 1e-6)).all(dim=0)
    assert (rgb_to_lab(perturbed) - rgb_to_lab(image))[:, inside].abs().max() <= max_offset + 0.01


@given(seed=st.integers(0, 999), max_offset=st.floats(0, 20))
@settings(max_examples=20, deadline=None)
def test_perturb_moves_colors_in_proportion_to_their_lightness(seed, max_offset):
    torch.manual_seed(seed)
    image = 0.3 + 0.4 * torch.rand(3, 12, 12, dtype=torch.float64)
    perturbed = PerturbStain(max_offset, preserve_white=False)(image)
    inside = ((perturbed > 1e-6) & (perturbed < 1 - 1e-6)).all(dim=0)
    before, after = (rgb_to_lab(each)[:, inside] for each in (image, perturbed))
    offsets = 60 * (after - before) / before[0]
    assert offsets.abs().max() <= max_offset + 0.01
    assert (offsets - offsets[:, :1]).abs().max() < 0.01


def test_perturb_draws_evenly():
    torch.manual_seed(0)
    gray = torch.full((2000, 3, 1, 1), 0.5668, dtype=torch.float64)
    assert rgb_to_lab(gray[0])[0].item() == pytest.approx(60, abs=0.05)
    moved = (rgb_to_lab(PerturbStain(16)(gray)) - rgb_to_lab(gray)).flatten(1)
    for offsets in moved.T:
        shares = [(offsets < limit).double().mean().item() for limit in (-15, -8, 0, 8, 15, 16.1)]
        assert shares == pytest.approx([1 / 32, 1 / 4, 1 / 2, 3 / 4, 31 / 32, 1], abs=0.03)
    assert (torch.corrcoef(moved.T) - torch.eye(3)).abs().max() < 0.08


@pytest.mark.parametrize("max_offset", [5, 25, 128])
def test_perturb_keeps_lighter_gray_lighter(max_offset):
    torch.manual_seed(0)
    gray = torch.linspace(0, 1, 1024, dtype=torch.float64).expand(3, 1, 1024)
    perturb = PerturbStain(max_offset)
    for _ in range(20):
        ((_, lightness),) = perturb.make_params([gray])["changes"].values()
        assert (shift_ab(gray, torch.zeros(2), True, lightness).diff(dim=-1) > -1e-6).all()


def test_perturb_keeps_white_and_black_unless_it_is_told_not_to():
    image = torch.full((8, 3, 4, 4), 255, dtype=torch.uint8)
    image[4:] = 10
    torch.manual_seed(0)
    assert torch.equal(PerturbStain(40)(image), image)
    changed = PerturbStain(40, preserve_white=False)(image)
    assert (changed != image).flatten(1).any(dim=1).all()
    assert torch.equal(PerturbStain(0)(image), image)


def test_perturb_draws_on_the_default_device():
    perturb, image = PerturbStain(), torch.rand(2, 3, 8, 8)
    with torch.device("meta"):
        assert perturb(image.to("meta")).shape == image.shape


def test_the_strongest_perturbation_moves_dark_and_pale_tissue_the_same_way():
    gray = torch.tensor([0.3, 0.6]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    for seed in range(20):
        moved = []
        for image in gray:
            torch.manual_seed(seed)
            moved.append((rgb_to_lab(PerturbStain(128)(image)) - rgb_to_lab(image))[1:].flatten())
        assert torch.cosine_similarity(*moved, dim=0) > 0.5


def test_perturb_draws_per_image_and_once_per_sample_and_video(tile):
    torch.manual_seed(0)
    perturb = PerturbStain(20)
    batch = perturb(tile.expand(4, 3, 128, 128))
    assert len({image.numpy().tobytes() for image in (*batch, tile)}) == 5
    video = perturb(tv_tensors.Video(tile.expand(2, 3, 128, 128)))
    assert torch.equal(video[0], video[1])
    assert not torch.equal(video[0], tile)
    first, second = perturb((tv_tensors.Image(tile), tv_tensors.Image(tile)))
    assert torch.equal(first, second)
    assert not torch.equal(first, tile)
    torch.manual_seed(5)
    one = perturb(tile)
    torch.manual_seed(5)
    assert torch.equal(perturb(tile), one)


def test_real_tiles_in_one_batch_equal_themselves(data, random_normalize):
    paths = sorted((data / "camelyon17/center_1").glob("*.png"))
    images = torch.stack([read(path) for path in paths])
    assert torch.equal(random_normalize(images), torch.stack([random_normalize(image) for image in images]))
