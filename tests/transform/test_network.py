import pytest
import torch

from stainnorm_transform import ColorNormNet
from stainnorm_transform import network as network_module
from stainnorm_transform.network import FrozenColorNormNet


def test_has_the_parameters_of_the_paper():
    assert sum(parameter.numel() for parameter in ColorNormNet().parameters() if parameter.requires_grad) == 2352


def test_blocks_2_and_3_are_dilated():
    dilations = [block.layers[0][0].dilation for block in ColorNormNet().blocks]
    assert [dilation > (1, 1) for dilation in dilations] == [False, True, True, False]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (64, 48)])
def test_the_map_is_as_large_as_the_image(size):
    lab = torch.rand(2, 3, *size) * 50
    assert ColorNormNet().eval()(lab).shape == lab.shape


def test_a_pixel_sees_its_neighborhood_and_no_more():
    torch.manual_seed(0)
    network = ColorNormNet().double().eval()
    lab = (torch.rand(1, 3, 1, 121, dtype=torch.float64) * 50).requires_grad_()
    network(lab)[0, 0, 0, 60].backward()
    reach = lab.grad.abs().sum(dim=(0, 1, 2)).nonzero()
    # Each 3 x 3 convolution reaches its dilation: 1 + 3 * (1 + 2 + 4 + 1) + 1.
    assert (reach.min().item(), reach.max().item()) == (60 - 26, 60 + 26)


def test_without_pooling_the_map_follows_the_image():
    network = ColorNormNet().eval()
    lab = torch.rand(1, 3, 90, 90) * 50
    inner = slice(30, 58)
    shifted = network(lab.roll(2, dims=-1))[..., inner, inner]
    torch.testing.assert_close(shifted, network(lab)[..., inner, 28:56], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (64, 48)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_frozen_it_is_the_same_map(size, count):
    """With a gradient it is made of convolutions, without of matrix products."""
    torch.manual_seed(1)
    network = ColorNormNet().eval()
    for name, value in network.named_buffers():
        if name.endswith("running_mean"):
            value.normal_()
        if name.endswith("running_var"):
            value.uniform_(0.2, 3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    lab = torch.rand(count, 3, *size) * 80
    frozen = FrozenColorNormNet(network)
    for again in (frozen, FrozenColorNormNet(frozen)):
        for image in (lab, lab.clone().requires_grad_()):
            out = again(image)
            assert out.requires_grad == image.requires_grad
            with torch.no_grad():
                expected = network(lab)
            torch.testing.assert_close(out.detach(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().sum() + 1))


@pytest.fixture
def frozen():
    torch.manual_seed(2)
    return FrozenColorNormNet(ColorNormNet().eval())


def test_any_layout_of_its_weights(frozen):
    lab = torch.rand(1, 3, 20, 30) * 50
    expected = frozen(lab)
    torch.manual_seed(2)
    network = ColorNormNet().eval().to(memory_format=torch.channels_last)
    torch.testing.assert_close(FrozenColorNormNet(network)(lab), expected)
    other = FrozenColorNormNet(ColorNormNet())
    state = {
        name: tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for name, tensor in frozen.state_dict().items()
    }
    for content in (state, network.state_dict()):
        other.load_state_dict(content, assign=True)
        torch.testing.assert_close(other(lab), expected)
    torch.testing.assert_close(frozen.to(memory_format=torch.channels_last)(lab), expected)


def test_weights_may_be_inputs(frozen):
    lab = torch.rand(2, 3, 12, 9) * 50
    expected, weight = frozen(lab), frozen.stem_weight

    def call(stem):
        return torch.func.functional_call(frozen, {"stem_weight": stem}, (lab,))

    torch.testing.assert_close(call(weight), expected)
    given = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(call(given).sum(), given)
    assert gradient.abs().sum() > 0
    several = torch.vmap(call)(torch.stack([weight, 2 * weight]))
    torch.testing.assert_close(several, torch.stack([expected, call(2 * weight)]))


def test_what_is_not_quite_an_old_state_is_refused(frozen):
    old = ColorNormNet().state_dict()
    frozen.load_state_dict(old)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        frozen.load_state_dict({**old, "junk": torch.ones(1)})
    missing = {name: tensor for name, tensor in old.items() if name != "blocks.1.layers.0.0.weight"}
    misshapen = {**old, "blocks.0.layers.1.0.weight": torch.zeros(3, 9, 3, 3)}
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    for state in (missing, misshapen):
        with pytest.raises(RuntimeError, match="Missing key"):
            frozen.load_state_dict(state)
        frozen.load_state_dict(state, strict=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())


def test_large_images_are_convolved(frozen, monkeypatch):
    lab = torch.rand(1, 3, 40, 30) * 50
    expected = frozen(lab)
    monkeypatch.setattr(network_module, "_MATRIX_PIXELS", 40 * 30 - 1)
    monkeypatch.setattr(FrozenColorNormNet, "_by_matrices", None)
    torch.testing.assert_close(frozen(lab), expected, atol=1e-4, rtol=1e-4)
