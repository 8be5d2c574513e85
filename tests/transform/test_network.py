import pytest
import torch

from stainnorm_transform import ColorNormNet


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
