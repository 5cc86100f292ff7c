"""Sums in place equal the plain formulas, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from adaptkit._cpu import accumulate
from adaptkit._cpu.accumulate import add_resampled, add_upsampled
from adaptkit.ops.grid import resample_map


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_a_transposed_convolution_added(layout):
    torch.manual_seed(0)
    shapes = ((2, 6, 8, 10), (2, 8, 4, 5), (8, 6, 2, 2), (6,))
    base, coarse, weight, bias = inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    grad = torch.randn(shapes[0], dtype=torch.float64)
    fine = (base * 2).contiguous(memory_format=layout)
    added = add_upsampled(fine, coarse, weight, bias)
    assert added.data_ptr() == fine.data_ptr()
    expected = base * 2 + F.conv_transpose2d(coarse, weight, bias, stride=2)
    torch.testing.assert_close(added, expected)
    for a, b in zip(torch.autograd.grad(added, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("numbers", [1, 2**20])
@pytest.mark.parametrize("pixels", [1, 4096])
@pytest.mark.parametrize(
    ("stride", "grid", "size"),
    [(16, (3, 5), (12, 20)), (14, (3, 4), (16, 16)), (32, (2, 2), (4, 3)), (2, (7, 6), (4, 3)), (14, (3, 4), (24, 24))],
)
def test_a_coarse_map_is_resampled_and_added(monkeypatch, numbers, pixels, stride, grid, size):
    monkeypatch.setattr(accumulate, "NUMBERS", numbers)
    monkeypatch.setattr(accumulate, "PIXELS", pixels)
    torch.manual_seed(0)
    shapes = ((2, 40, *size), (2, 40, *grid))
    base, x = inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    grad = torch.randn(shapes[0], dtype=torch.float64)
    fine = (base * 2).contiguous(memory_format=torch.channels_last)
    added = add_resampled(fine, x, stride, 4)
    assert added.data_ptr() == fine.data_ptr()
    expected = base * 2 + resample_map(x, stride, 4, size)
    torch.testing.assert_close(added, expected)
    for a, b in zip(torch.autograd.grad(added, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)
