"""Frozen linear layers whose gradient goes another way: the same forward to the bit, the same gradient."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import assert_rounds_to

from adaptkit._cpu import frozen
from adaptkit.core.block import Block, identity
from adaptkit.seam import reference

SUMS = (12, 20, 12, 20)  # of the terms of each product, there and back


@pytest.fixture
def calls(monkeypatch):
    seen, there = [], frozen.linear
    monkeypatch.setattr(frozen, "linear", lambda g, w: seen.append(tuple(w.shape)) or there(g, w))
    return seen


def mlp(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20, bias=bias), nn.GELU(), nn.Linear(20, 12)).to(dtype).requires_grad_(False)


def tokens(dtype=torch.float32):
    return torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def block(layers):
    """A frozen block that is these layers."""
    return Block(layers, identity, layers, identity, identity, identity, identity, lambda h: (h, h, h), identity)


def run(layers, x, quickly):
    y = block(layers)(x) if quickly else layers(x)
    return y, torch.autograd.grad(y.square().sum(), [x, *(p for p in layers.parameters() if p.requires_grad)])


@pytest.mark.parametrize("bias", [True, False])
def test_the_forward_is_the_host_s_to_the_bit_and_the_gradient_the_same(calls, bias):
    layers = mlp(bias)
    (y, grads), (own, own_grads) = run(layers, tokens(), True), run(layers, tokens(), False)
    assert torch.equal(y, own)
    assert_rounds_to(grads, own_grads, *SUMS)
    assert calls == [(20, 12), (12, 20)]


def test_what_is_trained_keeps_its_own_gradients(calls):
    layers = mlp()
    layers[0].weight.requires_grad_()
    (_, grads), (_, own) = run(layers, tokens(), True), run(layers, tokens(), False)
    assert_rounds_to(grads, own, *SUMS)
    assert calls == [(20, 12)]
    layers[2].bias.requires_grad_()
    run(layers, tokens(), True)
    assert calls == [(20, 12)]


def test_it_is_not_for_other_dtypes_autocast_or_tokens_without_gradient(calls):
    run(mlp(dtype=torch.float64), tokens(torch.float64), True)
    with torch.autocast("cpu", torch.bfloat16):
        run(mlp(), tokens(), True)
    assert not block(mlp())(tokens().detach()).requires_grad
    with torch.no_grad():
        block(mlp())(tokens())
    with reference():
        run(mlp(), tokens(), True)
    assert calls == []


def test_it_can_be_computed_again_and_differentiated_twice(calls):
    layers, x = mlp(), tokens()
    (grad,) = torch.autograd.grad(checkpoint(block(layers), x, use_reentrant=False).square().sum(), x)
    assert_rounds_to(grad, run(layers, tokens(), False)[1][0], *SUMS)
    assert len(calls) == 2
    twice = []
    for quickly in (True, False):
        y = block(layers)(x) if quickly else layers(x)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        twice.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert_rounds_to(*twice, *SUMS, *SUMS)


def test_within_a_transform_it_is_torch_s_own(calls):
    layers, x = mlp(), tokens().detach()
    own = torch.func.grad(lambda x: layers(x).square().sum())(x)
    assert_rounds_to(torch.func.grad(lambda x: block(layers)(x).square().sum())(x), own, *SUMS)
    assert_rounds_to(torch.func.vmap(torch.func.grad(lambda x: block(layers)(x).square().sum()))(x), own, *SUMS)
    assert calls == []
