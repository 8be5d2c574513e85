"""One table of contracts: every operation on every kind of input, in every context where layers are put."""

import contextlib
import copy
import functools
import io
import pickle

import kornia
import pytest
import torch
from PIL import Image
from render_tiles import render_tile
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform import ColorNormNet, NormalizeStain, PerturbStain
from stainnorm_transform.color import rgb_to_lab, shift_ab


def uint8(count: int = 3) -> torch.Tensor:
    """Tiles whose offsets differ, one of them blank: (count, 3, 64, 48)."""
    tiles = torch.stack([render_tile(seed, 64)[..., :48] for seed in range(count)])
    tiles[1:2] = 255
    return tiles


def pil() -> Image.Image:
    image = to_pil_image(uint8()[0])
    image.info.update(dpi=(300, 300), icc_profile=b"profile", comment="kept")
    return image


INPUTS = {
    "PIL": pil,
    "uint8": lambda: uint8(),
    "float16": lambda: (uint8() / 255).half(),
    "bfloat16": lambda: (uint8() / 255).bfloat16(),
    "float32": lambda: uint8() / 255,
    "float64": lambda: uint8().double() / 255,
    "tv_tensors.Image": lambda: tv_tensors.Image(uint8()),
    "tv_tensors.Video": lambda: tv_tensors.Video(uint8() / 255),
    "channels last": lambda: (uint8() / 255).to(memory_format=torch.channels_last),
    "channels last, uint8": lambda: uint8().to(memory_format=torch.channels_last),
    "every second pixel": lambda: torch.stack([render_tile(seed, 128) for seed in range(2)])[..., ::2, ::2],
    "a view of HWC": lambda: uint8()[0].permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "expanded": lambda: (uint8()[0] / 255).expand(2, 3, 64, 48),
    "batch of 0": lambda: uint8()[:0] / 255,
    "batch of 1": lambda: uint8()[:1],
    "one image": lambda: uint8()[0] / 255,
    "5-D": lambda: torch.stack([uint8(2), uint8(2)]),
    "one pixel": lambda: uint8()[..., :1, :1],
    "one row": lambda: uint8()[..., :1, :] / 255,
}
TENSORS = [name for name in INPUTS if name != "PIL"]


def random_network() -> ColorNormNet:
    torch.manual_seed(0)
    network = ColorNormNet()
    with torch.no_grad():
        network.head.bias.copy_(torch.tensor([0.0, 0.4, -0.3]))
    return network


COLOR_MAP = torch.tensor([[-7.0, 2.0, -4.0, 1.0], [9.0, 3.0, 2.0, -5.0]])


class Shift(nn.Module):
    """shift_ab, which has no PIL images."""

    def __init__(self, *shift):
        super().__init__()
        self.shift = shift

    def forward(self, image):
        shift, *lightness = self.shift
        return shift_ab(image, shift, True, *lightness)


OPERATIONS = {
    "NormalizeStain": lambda: NormalizeStain(random_network()),
    "fixed map": lambda: NormalizeStain(random_network(), fixed_map=COLOR_MAP),
    "uniform": lambda: NormalizeStain(random_network(), preserve_white=False, slopes=False),
    "PerturbStain": lambda: PerturbStain(20),
    "shift_ab": lambda: Shift(torch.tensor([7.0, -9.0])),
    "shift_ab by a map and lightness": lambda: Shift(COLOR_MAP, torch.tensor(0.8)),
}
SHIFTS = ["shift_ab", "shift_ab by a map and lightness"]
ESTIMATING = ["NormalizeStain", "fixed map", "uniform", *SHIFTS]


@pytest.fixture(params=OPERATIONS)
def operation(request):
    """An operation, with the same random numbers at every call."""
    made = OPERATIONS[request.param]()

    def run(image, *, by=made):
        torch.manual_seed(0)
        return by(image)

    run.module = made
    run.name = request.param
    return run


def content(image) -> tuple:
    """Everything there is to an image, for ==."""
    if isinstance(image, Image.Image):
        return image.mode, image.size, image.tobytes(), image.info
    plain = image.as_subclass(torch.Tensor)
    return type(image), plain.dtype, plain.shape, plain.device, plain.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("kind", INPUTS)
def test_what_comes_out_is_what_went_in_but_for_its_colors(operation, kind):
    if kind == "PIL" and operation.name in SHIFTS:
        with pytest.raises(TypeError, match="expected a tensor, got Image"):
            operation(INPUTS[kind]())
        return
    image = INPUTS[kind]()
    before = content(image)
    out = operation(image)
    assert content(image) == before, "the input was written to"
    assert content(operation(image)) == content(out), "not deterministic"
    if operation.name in SHIFTS:  # like any torch function, it makes tensors of tv_tensors
        assert type(out) is torch.Tensor
    elif kind != "PIL":
        assert type(out) is type(image)
    if kind == "PIL":
        assert isinstance(out, Image.Image)
        assert (out.mode, out.size, out.info) == (image.mode, image.size, image.info)
        return
    assert (out.dtype, out.shape, out.device) == (image.dtype, image.shape, image.device)
    assert out.data_ptr() != image.data_ptr() or image.numel() == 0
    if "channels last" in kind:
        assert out.is_contiguous(memory_format=torch.channels_last)
    if kind not in ("batch of 0", "one pixel", "one row"):
        assert not torch.equal(out, image)


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("name", ESTIMATING)
def test_a_batch_is_its_images(name, kind):
    operation = OPERATIONS[name]()
    images = INPUTS[kind]().as_subclass(torch.Tensor)
    flat = images.reshape(-1, *images.shape[-3:])
    single = [operation(image) for image in flat]
    assert torch.equal(operation(images).reshape(flat.shape), torch.stack(single) if single else flat)


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULT_DTYPES = [functools.partial(default_dtype, dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)]
CONTEXTS = [torch.inference_mode, torch.no_grad, autocast, *DEFAULT_DTYPES]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", ["uint8", "float16", "float32", "float64", "tv_tensors.Image"])
def test_contexts_change_nothing(operation, kind, context):
    image = INPUTS[kind]()
    expected = content(operation(image))
    with context():
        assert content(operation(image)) == expected


@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_change_no_estimate(context):
    normalize = OPERATIONS["NormalizeStain"]()
    tiles = uint8()
    dense, slide = normalize.estimate_offset(tiles, dense=True), normalize.for_slide(tiles).fixed_map
    dense_map = normalize.estimate_map(tiles, dense=True)
    with context():
        assert torch.equal(normalize.estimate_offset(tiles, dense=True), dense)
        assert torch.equal(normalize.estimate_map(tiles, dense=True), dense_map)
        assert torch.equal(normalize.for_slide(tiles).fixed_map, slide)


@pytest.mark.parametrize("context", DEFAULT_DTYPES)
def test_a_module_made_in_another_default_dtype_is_the_same(context):
    image = uint8()
    expected = NormalizeStain.pretrained()(image)
    with context():
        normalize = NormalizeStain.pretrained()
        assert {buffer.dtype for buffer in normalize.buffers()} == {torch.float32}
        assert torch.equal(normalize(image), expected)


def test_what_is_loaded_in_inference_mode_passes_gradients():
    with torch.inference_mode():
        normalize = NormalizeStain.pretrained()
    image = (uint8() / 255).requires_grad_()
    normalize(image).sum().backward()
    assert image.grad.isfinite().all()


def in_training_mode(module):
    return module.train()


def halved(module):
    return nn.Sequential(copy.deepcopy(module)).half()


def doubled(module):
    return nn.Sequential(copy.deepcopy(module)).double()


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def restored(module):
    fresh = copy.deepcopy(module)
    for buffer in fresh.buffers():
        buffer.data = torch.zeros_like(buffer)
    fresh.load_state_dict(module.state_dict(), strict=True)
    return fresh


def averaged(module):
    mean = torch.optim.swa_utils.AveragedModel(nn.Sequential(module, nn.Linear(1, 1)), use_buffers=True)
    for _ in range(3):
        mean.update_parameters(nn.Sequential(module, nn.Linear(1, 1)))
    return mean.module[0]


def with_synchronized_batch_norm(module):
    return nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(copy.deepcopy(module)))


def shared(module):
    return copy.deepcopy(module).share_memory()


def in_parallel(module):
    return nn.DataParallel(nn.Sequential(module))


def called_with_its_state(module):
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return lambda image: torch.func.functional_call(module, state, (image,))


def moved(module):
    return module.to("cpu", non_blocking=True).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "change",
    [
        in_training_mode, halved, doubled, pickled, copy.copy, copy.deepcopy, saved_and_loaded, restored, moved,
        averaged, with_synchronized_batch_norm, shared, in_parallel, called_with_its_state,
    ],
)  # fmt: skip
def test_what_is_done_to_the_module_changes_nothing(operation, change):
    image = uint8() / 255
    expected = operation(image)
    assert torch.equal(operation(image, by=change(operation.module)), expected)


@pytest.mark.parametrize("name", ["NormalizeStain", "fixed map", "uniform"])
def test_all_state_is_in_the_state_dict(name):
    state = OPERATIONS[name]().state_dict()
    assert sum(tensor.numel() for tensor in state.values()) >= 2352
    assert state.pop("_extra_state").dtype == torch.uint8
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize("name", ESTIMATING)
def test_vmap_is_a_batch(name):
    operation, images = OPERATIONS[name](), uint8() / 255
    torch.testing.assert_close(torch.func.vmap(operation)(images), operation(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", [lambda image: image[..., ::2], lambda image: image[:1].expand(3, 3, 64, 48)])
def test_vmap_over_shifts_of_an_image_of_any_layout(layout):
    image = layout(uint8() / 255)
    for shifts in (torch.tensor([[1.0, 2.0], [-9.0, 12.0]]), torch.stack([COLOR_MAP, -COLOR_MAP])):
        expected = torch.stack([shift_ab(image, shift) for shift in shifts])
        mapped = torch.func.vmap(lambda shift: shift_ab(image, shift))(shifts)
        torch.testing.assert_close(mapped, expected, atol=1e-5, rtol=0)


def test_vmap_over_images_maps_and_lightness():
    images, maps, lightness = (
        uint8() / 255,
        torch.stack([COLOR_MAP, 0 * COLOR_MAP, -COLOR_MAP]),
        torch.tensor([0.8, 1, 2]),
    )
    expected = shift_ab(images, maps, True, lightness)
    mapped = torch.func.vmap(lambda image, shift, factor: shift_ab(image, shift, True, factor))(images, maps, lightness)
    torch.testing.assert_close(mapped, expected, atol=1e-5, rtol=0)


def test_vmap_over_the_map_of_a_uint8_image():
    normalize, image = OPERATIONS["fixed map"](), uint8()
    maps = torch.stack([COLOR_MAP, -0.5 * COLOR_MAP])

    def by(color_map):
        state = {**dict(normalize.named_buffers()), "fixed_map": color_map}
        return torch.func.functional_call(normalize, state, (image,))

    expected = torch.stack([normalize.with_map(color_map)(image) for color_map in maps])
    assert (torch.func.vmap(by)(maps).int() - expected.int()).abs().max() <= 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")  # of torch's own derivatives
def test_functionalized_and_dual_tensors():
    image = uint8() / 255
    permuted = image.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    for shift in (torch.tensor([4.0, -6.0]), COLOR_MAP):
        expected = shift_ab(image, shift)
        made = torch.func.functionalize(lambda image, shift: shift_ab(image, shift))(image, shift)
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)
        with forward_ad.dual_level():
            dual = shift_ab(forward_ad.make_dual(permuted, permuted), shift)
            assert dual.stride() == permuted.stride()


def test_autocast_leaves_the_lab_conversion_in_float32():
    image = uint8() / 255
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lab = rgb_to_lab(image)
    assert torch.equal(lab, kornia.color.rgb_to_lab(image))


@pytest.mark.parametrize("name", ESTIMATING)
def test_outputs_go_before_a_layer_that_is_trained(name):
    model = nn.Sequential(OPERATIONS[name](), nn.Conv2d(3, 2, 3))
    with torch.inference_mode():
        model(uint8() / 255)
    model(uint8() / 255).sum().backward()
    assert model[1].weight.grad.isfinite().all()
    assert not list(model[0].parameters())


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(NormalizeStain(random_network()), nn.Conv2d(3, 2, 3))
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped.train()(uint8() / 255).sum().backward()
        assert model[1].weight.grad.isfinite().all()
    finally:
        torch.distributed.destroy_process_group()


class Dressed(torch.Tensor):
    """A tensor that carries something, as those of MONAI and fastai do."""

    def __new__(cls, data, note=""):
        made = data.as_subclass(cls)
        made.note = note
        return made

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs)
        if isinstance(out, cls):
            out.note = next((arg.note for arg in args if isinstance(arg, cls)), "")
        return out


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", ["NormalizeStain", "fixed map", "PerturbStain"])
def test_a_tensor_keeps_what_it_carries(name, gradient):
    operation, image = OPERATIONS[name](), (uint8() / 255).to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    expected = operation(image.clone().requires_grad_(gradient)).detach()
    torch.manual_seed(0)
    out = operation(Dressed(image, "slide 7").requires_grad_(gradient))
    assert type(out) is Dressed
    assert out.note == "slide 7"
    assert out.requires_grad == gradient
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out.detach().as_subclass(torch.Tensor), expected)
    if name != "PerturbStain":
        assert type(operation.estimate_offset(Dressed(image))) is torch.Tensor
        assert type(operation.estimate_map(Dressed(image))) is torch.Tensor
        assert type(operation.for_slide([Dressed(image)]).fixed_map) is torch.Tensor


def test_a_parameter_is_an_image_like_any_other():
    """As for attacks and visualizations, which change pixels by their gradient."""
    operation, image = OPERATIONS["NormalizeStain"](), uint8() / 255
    out = operation(nn.Parameter(image))
    assert type(out) is torch.Tensor
    torch.testing.assert_close(out.detach(), operation(image), atol=1e-5, rtol=0)


def test_fake_tensors():
    """Shapes without values, as tools use that plan memory and compilers."""
    with FakeTensorMode():
        normalize = NormalizeStain.pretrained()
        slide = normalize.for_slide(torch.rand(2, 3, 64, 64))
        for module in (normalize, slide, PerturbStain(5.0)):
            for image in (torch.rand(2, 3, 40, 50), torch.zeros(3, 40, 50, dtype=torch.uint8)):
                out = module(image)
                assert (out.shape, out.dtype) == (image.shape, image.dtype)
        assert normalize.estimate_offset(torch.rand(2, 3, 40, 50)).shape == (2, 3)
        assert normalize.estimate_map(torch.rand(2, 3, 40, 50)).shape == (2, 2, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="run on a machine with a CUDA device")
class TestCuda:
    """On CUDA: what the CPU gives, within 3e-4 (convolutions are in TF32) or a level, as it came, without waiting."""

    @pytest.mark.parametrize("kind", [kind for kind in INPUTS if kind != "PIL"])
    def test_it_is_what_the_cpu_gives(self, operation, kind):
        image = INPUTS[kind]()
        expected = operation(image)
        out = operation(image.to("cuda"), by=copy.deepcopy(operation.module).cuda())
        assert (out.dtype, out.shape, out.device.type) == (image.dtype, image.shape, "cuda")
        assert out.stride() == expected.stride()
        tolerance = {torch.uint8: 1, torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(image.dtype, 3e-4)
        torch.testing.assert_close(out.cpu(), expected, atol=tolerance, rtol=0)

    def test_without_tf32_the_estimate_is_that_of_the_cpu(self):
        module, image = OPERATIONS["NormalizeStain"](), uint8()
        expected, expected_map = module.estimate_offset(image), module.estimate_map(image)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            on_device = copy.deepcopy(module).cuda()
            out, color_map = on_device.estimate_offset(image.cuda()), on_device.estimate_map(image.cuda())
        torch.testing.assert_close(out.cpu(), expected, atol=1e-3, rtol=0)
        # Slopes divide by the variances of the colors.
        torch.testing.assert_close(color_map.cpu(), expected_map, atol=1e-2, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_autocast_changes_nothing(self, operation, dtype):
        image, module = (uint8() / 255).cuda(), copy.deepcopy(operation.module).cuda()
        expected = operation(image, by=module)
        with torch.autocast("cuda", dtype=dtype):
            assert torch.equal(operation(image, by=module), expected)

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
    @pytest.mark.parametrize("name", ["NormalizeStain", "fixed map", *SHIFTS])
    def test_nothing_waits_for_the_device(self, name, dtype):
        """So it can be captured in a CUDA graph, too."""
        image, module = (uint8() if dtype == torch.uint8 else (uint8() / 255).to(dtype)).cuda(), OPERATIONS[name]()
        if name in SHIFTS:
            module = Shift(*(tensor.cuda() for tensor in module.shift))
        elif name == "NormalizeStain":
            module = module.cuda()
        else:
            module = NormalizeStain(module.network.cuda()).with_map(COLOR_MAP)
        expected = module(image)
        try:
            torch.cuda.set_sync_debug_mode("error")
            module(image)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(image)
        graph.replay()
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)

    def test_memory_is_small_beside_the_images(self):
        images = torch.rand(64, 3, 1024, 1024, device="cuda")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = OPERATIONS["NormalizeStain"]().cuda()(images)
        assert torch.cuda.max_memory_allocated() - before < 2 * out.nbytes

    def test_gradients_are_those_of_the_cpu(self):
        gradients = []
        for device in ("cpu", "cuda"):
            image = (uint8() / 255).to(device).requires_grad_()
            OPERATIONS["NormalizeStain"]().to(device)(image).square().sum().backward()
            gradients.append(image.grad.cpu())
        torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)

    def test_the_network_follows_the_model_and_stays_in_float32(self):
        model = nn.Sequential(OPERATIONS["fixed map"]()).cuda().half()
        assert {(buffer.device.type, buffer.dtype) for buffer in model.buffers()} == {("cuda", torch.float32)}
