"""Attention inside sequences of any length, against the masked one."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import assert_rounds_to

from adaptkit._cpu.packed_attention import UNFUSED, attention, index, packed_attention
from adaptkit.ops.masked_attention import masked_attention

B, H, T, E = 3, 2, 7, 4
COUNTS = (7, 1, 4)


@pytest.mark.parametrize("together", [False, True])
def test_packed_attention_equals_the_masked_one(together):
    g = torch.Generator().manual_seed(0)
    qkv = [torch.randn(B, H, T, E, generator=g, dtype=torch.float64) for _ in range(3)]
    keep = torch.zeros(B, T, dtype=torch.float64)
    for i, n in enumerate(COUNTS):
        keep[i, torch.randperm(T, generator=g)[:n]] = 1
    rows = keep.flatten().bool()
    packed = [x.transpose(1, 2).flatten(0, 1)[rows].transpose(0, 1)[None] for x in qkv]  # (1, H, R, E)
    out = packed_attention(*packed, COUNTS, together=together)
    expected = masked_attention(*qkv, keep).transpose(1, 2).flatten(0, 1)[rows].transpose(0, 1)[None]
    torch.testing.assert_close(out, expected)


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
