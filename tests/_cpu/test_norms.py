"""A norm in eval mode as an affine map: the same numbers and gradients."""

import pytest
import torch

from adaptkit._cpu.norms import conv_norm, norm_map, norm_twice
from adaptkit.core.layers import norm2d

KINDS = ["batch", "sync", "group", "layer"]


@pytest.mark.parametrize("kind", KINDS)
def test_in_eval_mode_it_is_one_pass_and_in_place_where_the_map_is_ours(kind):
    torch.manual_seed(0)
    norm = norm2d(kind, 6).train()
    norm(torch.randn(4, 6, 5, 5))
    torch.nn.init.normal_(norm.weight)
    norm.eval()
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    expected, kept = norm(x), norm_map(norm, x, mine=True)
    torch.testing.assert_close(kept, expected)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), [x, norm.weight]) for y in (kept, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        before = x.detach().clone()
        assert torch.equal(norm_map(norm, before), kept)
        assert torch.equal(before, x)
        out = norm_map(norm, before, mine=True)
    assert torch.equal(out, kept)
    assert (out.data_ptr() == before.data_ptr()) == (kind in ("batch", "sync"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_in_eval_mode_it_is_part_of_the_convolution_before_it(kind, bias):
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(3, 6, 3, 2, 1, bias=bias).double(), norm2d(kind, 6).double().train()
    x = torch.randn(4, 3, 9, 8).double()
    assert torch.equal(conv_norm(conv, norm, x), norm(conv(x)))
    torch.nn.init.normal_(norm.weight)
    norm.eval()
    x.requires_grad_()
    inputs = [x, conv.weight, norm.weight, norm.bias]
    mine, expected = conv_norm(conv, norm, x), norm(conv(x))
    torch.testing.assert_close(mine, expected)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (mine, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_once_more_it_says_the_same_whatever_became_of_the_norm_and_counts_nothing(kind, training):
    norm, x = norm2d(kind, 6).train(), torch.randn(2, 6, 4, 4)
    norm(torch.randn(4, 6, 5, 5) + 1)
    first, again = norm_twice(norm.train(training), x)
    torch.testing.assert_close(first, norm(x))
    norm.train(not training)
    norm(x + 3)
    norm.eval()
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    torch.testing.assert_close(again(), first)
    torch.testing.assert_close(norm.state_dict(), before)
