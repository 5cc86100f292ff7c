"""Softmax over groups of numbers."""

import pytest
import torch

from adaptkit._cpu.softmax import grouped_softmax


@pytest.mark.parametrize(("shape", "groups"), [((2, 7, 24), 6), ((5, 4), 1), ((1, 3, 6), 6)])
def test_softmax_of_each_group_and_its_gradient(shape, groups):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = x.unflatten(-1, (groups, -1)).softmax(-1).flatten(-2)
    found = grouped_softmax(x, groups)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-12)
    weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    (a,), (b,) = (torch.autograd.grad(y, x, weight) for y in (found, expected))
    torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-12)


def test_what_is_far_apart_stays_a_number():
    x = torch.tensor([[1e4, -1e4, 0.0, 0.0]])
    assert grouped_softmax(x, 2).tolist() == [[1.0, 0.0, 0.5, 0.5]]
