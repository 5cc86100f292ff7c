"""BatchNorm and the layer behind it, image by image: the same numbers, gradients and running statistics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptkit._cpu import batch_norm
from adaptkit._cpu.batch_norm import is_supported, norm_large, norm_pool, norm_relu_conv


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layer", ["conv", "pool"])
def test_it_is_the_layers_one_after_the_other(layer, batch, layout):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    plain = copy.deepcopy(norm)
    x = (3 + 2 * torch.randn(batch, 5, 8, 6).double()).contiguous(memory_format=layout).requires_grad_()
    kernel = torch.randn(4, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    if layer == "conv":
        found, expected = norm_relu_conv(x, norm, kernel), F.conv2d(plain(x).relu(), kernel, padding=1)
    else:
        found, expected = norm_pool(x, norm), F.max_pool2d(plain(x), 3, 2, 1)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=layout)
    torch.testing.assert_close(norm.state_dict(), plain.state_dict())
    grad = torch.randn_like(found)
    inputs = [x] + [kernel] * (layer == "conv")
    mine = torch.autograd.grad(found, [*inputs, norm.weight, norm.bias], grad)
    theirs = torch.autograd.grad(expected, [*inputs, plain.weight, plain.bias], grad)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 5, 8, 6), (3, 5, 8, 6), (2, 1, 4, 1)])
def test_a_large_map_is_normed_part_by_part(monkeypatch, shape, layout):
    monkeypatch.setattr(batch_norm, "_NUMBERS", 35)
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(shape[1]).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    plain = copy.deepcopy(norm)
    x = (3 + 2 * torch.randn(shape).double()).contiguous(memory_format=layout).requires_grad_()
    found, expected = norm_large(x, norm), plain(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(norm.state_dict(), plain.state_dict())
    grad = torch.randn(shape, dtype=torch.float64)
    mine = torch.autograd.grad(found, [x, norm.weight, norm.bias], grad)
    theirs = torch.autograd.grad(expected, [x, plain.weight, plain.bias], grad)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_it_suits_the_plain_norm_in_training_alone():
    x = torch.randn(2, 5, 8, 8)
    assert is_supported(nn.BatchNorm2d(5), x)
    assert not is_supported(nn.BatchNorm2d(5).eval(), x)
    assert not is_supported(nn.BatchNorm2d(5, momentum=None), x)
    assert not is_supported(nn.BatchNorm2d(5, track_running_stats=False), x)
    assert not is_supported(nn.SyncBatchNorm(5), x)
    assert not is_supported(nn.GroupNorm(5, 5), x)
    assert not is_supported(nn.BatchNorm2d(5).double(), x)
