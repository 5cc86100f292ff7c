"""Attention among kept tokens: masked, packed, and by the book."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import assert_rounds_to

from adaptkit.ops.kept import UNFUSED, attention, index, masked_attention, packed_attention, packed_backend

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


@pytest.mark.parametrize("backend", ["each", "bucket"])
def test_packed_attention_equals_the_masked_one(qkv, keep, backend):
    rows = keep.flatten().bool()
    packed = [x.transpose(1, 2).flatten(0, 1)[rows].transpose(0, 1)[None] for x in qkv]  # (1, H, R, E)
    out = packed_attention(*packed, COUNTS, backend=backend)
    expected = masked_attention(*qkv, keep).transpose(1, 2).flatten(0, 1)[rows].transpose(0, 1)[None]
    torch.testing.assert_close(out, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the flash kernel of sequences of any length is CUDA's")
def test_packed_attention_on_cuda_equals_that_on_the_cpu(qkv, keep):
    rows = keep.flatten().bool()
    packed = [x.transpose(1, 2).flatten(0, 1)[rows].transpose(0, 1)[None] for x in qkv]
    wide = [torch.nn.functional.pad(x, (0, 60)) for x in packed]  # the kernel wants a head of 8, 16, ... 64
    half = [x.cuda().bfloat16() for x in wide]
    out = packed_attention(*half, COUNTS, scale=0.5, backend="varlen").cpu().double()
    torch.testing.assert_close(out, packed_attention(*wide, COUNTS, scale=0.5), atol=3e-2, rtol=3e-2)


def test_short_sequences_go_together_only_where_padding_is_allowed(qkv):
    q = qkv[0]
    assert packed_backend(q, None, [3, 9], padded=True) == "bucket"
    assert packed_backend(q, None, [3, 9], padded=False) == "each"
    assert packed_backend(q, None, [3, 90], padded=True) == "each"
    assert packed_backend(q, q, [3, 9], padded=True) == "each"


@pytest.mark.parametrize("rows", [1, 9, UNFUSED, UNFUSED + 1])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_attention_of_one_image_is_the_fused_one(rows, scale, biased):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, H, rows, E).unbind()
    bias = torch.randn(1, H, rows, rows) if biased else None
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    logits = (q @ k.mT * (E**-0.5 if scale is None else scale)).abs().max()
    # exp turns what a logit is off into a share
    assert_rounds_to(attention(q, k, v, scale, bias), want, E, rows, magnitude=v.abs().max() * (1 + logits))


def test_places_become_an_index():
    for places in ([], [3], [0, 2, 5]):
        assert torch.equal(index(places), torch.tensor(places, dtype=torch.int64))
