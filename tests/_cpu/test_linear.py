"""Linear layers beside their norm and their sum say what torch's say, and so do their gradients."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import assert_rounds_to

from adaptkit._cpu import linear as ops
from adaptkit._cpu.linear import add_linear, branch_linear, linear, norm_linear

SUMS = (10, 10)  # at most 10 rows and 8 channels: a norm, a product


def inputs(*shapes, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def norm_of(dim, dtype=torch.float64):
    norm = nn.LayerNorm(dim, dtype=dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def gradients(y, *leaves):
    return torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))


@pytest.fixture(params=[8, 2**21])
def rows(request, monkeypatch):
    """Slices of one or two rows, which do not divide their number, and one slice."""
    monkeypatch.setattr(ops, "NUMBERS", request.param)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_and_a_linear_layer(bias):
    x, weight, b = inputs((2, 5, 8), (3, 8), (3,))
    norm, b = norm_of(8), b if bias else None
    leaves = [t for t in (x, norm.weight, norm.bias, weight, b) if t is not None]
    ours, plain = norm_linear(x, norm, weight, b), F.linear(norm(x), weight, b)
    assert_rounds_to(ours, plain, *SUMS)
    for a, c in zip(gradients(ours, *leaves), gradients(plain, *leaves), strict=True):
        assert_rounds_to(a, c, *SUMS)


@pytest.mark.parametrize("wanted", ["x", "norm", "weight", "bias"])
def test_gradients_of_what_is_trained_alone(wanted):
    x, weight, b = inputs((2, 5, 8), (3, 8), (3,))
    norm = norm_of(8)
    leaf = {"x": x, "norm": norm.bias, "weight": weight, "bias": b}[wanted]
    for t in (x, weight, b, *norm.parameters()):
        t.requires_grad_(t is leaf)
    (ours,) = gradients(norm_linear(x, norm, weight, b), leaf)
    (plain,) = gradients(F.linear(norm(x), weight, b), leaf)
    assert_rounds_to(ours, plain, *SUMS)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("parts", ["both", "branch", "residual"])
def test_the_branch_of_a_residual(parts):
    x, weight, b = inputs((2, 5, 8), (8, 8), (8,))
    norm = norm_of(8)
    same, branch = branch_linear(x, norm, weight, b)
    assert torch.equal(same, x)
    use = {"both": lambda x, y: x.sin() + y, "branch": lambda x, y: y, "residual": lambda x, y: x.sin()}[parts]
    ours, plain = use(same, branch), use(x, F.linear(norm(x), weight, b))
    assert_rounds_to(gradients(ours, x), gradients(plain, x), *SUMS)


def test_a_residual_without_gradients_is_as_it_was():
    x, weight, b = inputs((2, 5, 8), (8, 8), (8,))
    assert branch_linear(x.detach(), norm_of(8), weight, b)[0].requires_grad is False
    with torch.no_grad():
        assert branch_linear(x, norm_of(8), weight, b)[0] is x
    assert branch_linear(x, nn.Identity(), weight, b)[0] is x


def test_no_norm_is_a_linear_layer():
    x, weight, b = inputs((2, 5, 8), (3, 8), (3,))
    assert torch.equal(norm_linear(x, nn.Identity(), weight, b), F.linear(x, weight, b))


def test_a_part_of_the_tokens():
    x, weight = inputs((2, 6, 8), (3, 8))
    norm = norm_of(8)
    ours, plain = norm_linear(x[:, 1:], norm, weight, None), F.linear(norm(x[:, 1:]), weight)
    assert_rounds_to(gradients(ours, x), gradients(plain, x), *SUMS)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_a_sum(bias):
    x, y, weight, b = inputs((2, 5, 3), (2, 5, 8), (3, 8), (3,))
    b = b if bias else None
    leaves = [t for t in (x, y, weight, b) if t is not None]
    ours, plain = add_linear(x, y, weight, b), x + F.linear(y, weight, b)
    assert_rounds_to(ours, plain, *SUMS)
    for a, c in zip(gradients(ours, *leaves), gradients(plain, *leaves), strict=True):
        assert_rounds_to(a, c, *SUMS)


@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 16), (1, 1, 16), (0, 16)])
def test_a_product_in_float32(shape):
    x, weight, b = inputs(shape, (5, 16), (5,), dtype=torch.float32)
    for bias in (b, None):
        ours, plain = linear(x, weight, bias), F.linear(x, weight, bias)
        assert_rounds_to(ours, plain, 17)
        assert_rounds_to(gradients(ours, x, weight), gradients(plain, x, weight), 17)


def test_a_sum_leaves_its_terms_alone():
    x, y, weight, b = inputs((2, 50, 24), (2, 50, 16), (24, 16), (24,), dtype=torch.float32)
    kept, before = add_linear(x, y, weight, b), x.detach().clone()
    with torch.no_grad():
        assert torch.equal(add_linear(x, y, weight, b), kept)
    assert torch.equal(x, before)
