"""Attention among kept tokens, masked, and by the book."""

import pytest
import torch

from adaptkit.ops.masked_attention import masked_attention

B, H, T, E = 3, 2, 7, 4
COUNTS = (7, 1, 4)


@pytest.fixture
def qkv():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, T, E, generator=g, dtype=torch.float64) for _ in range(3)]


@pytest.fixture
def keep():
    keep = torch.zeros(B, T, dtype=torch.float64)
    for i, n in enumerate(COUNTS):
        keep[i, torch.randperm(T, generator=torch.Generator().manual_seed(i))[:n]] = 1
    return keep


def by_the_book(q, k, v, keep, bias=None):
    """Softmax over kept keys, image by image."""
    logits = q @ k.transpose(-2, -1) * E**-0.5 + (0 if bias is None else bias)
    return logits.masked_fill(keep[:, None, None] == 0, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("graded", [False, True])
def test_masked_attention_reads_kept_keys_only(qkv, keep, graded, biased):
    bias = torch.randn(1, H, T, T, dtype=torch.float64) if biased else None
    out = masked_attention(*qkv, keep.requires_grad_(graded), bias=bias)
    torch.testing.assert_close(out, by_the_book(*qkv, keep.detach(), bias))


def test_the_gradient_of_keep_is_that_of_the_restricted_softmax(qkv, keep):
    keep = keep.requires_grad_()
    soft = (0.2 + 0.6 * torch.rand(B, T, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: masked_attention(*qkv, t), soft)
    masked_attention(*qkv, keep).sum().backward()
    assert keep.grad.isfinite().all()
    assert (keep.grad != 0).any()


def test_a_far_off_key_gives_no_overflow_in_the_gradient():
    q = torch.ones(1, 1, 2, 4)
    k = torch.tensor([[1.0] * 4, [500.0] * 4])[None, None]
    keep = torch.tensor([[1.0, 0.0]]).requires_grad_()
    masked_attention(q, k, torch.randn(1, 1, 2, 4), keep).sum().backward()
    assert keep.grad.isfinite().all()
