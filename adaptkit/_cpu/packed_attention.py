"""Attention inside each of several sequences of any length that are laid end to end, on a CPU without gradients."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SHORT", "attention", "index", "packed_attention"]

SHORT = 48  #: rows up to which calling for each sequence costs more than padding to one length
UNFUSED = 160  #: rows up to which two products and a softmax beat the fused kernel
BUCKET = 8  #: sequences whose lengths share a multiple of this are padded to one length


def index(places: Sequence[int]) -> Tensor:
    """``torch.tensor(places)``, (n,) int64 on the CPU, in a fifth of its time."""
    return torch.frombuffer(array("q", places), dtype=torch.int64) if places else torch.zeros(0, dtype=torch.int64)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """``F.scaled_dot_product_attention`` of one image, (1, heads, R, E), by the fastest way there is.

    ``bias`` is added to the logits, (1, heads, R, R).
    """
    if bias is not None or k.shape[2] > UNFUSED:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    logits = torch.baddbmm(q.new_zeros(1), q[0], k[0].transpose(1, 2), beta=0, alpha=scale)
    return torch.bmm(torch.softmax(logits, -1), v[0])[None]


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scale: float | None = None,
    biases: Sequence[Tensor] | None = None,
    together: bool = False,
) -> Tensor:
    """Attention inside each of several sequences that are laid end to end.

    Args:
        q, k, v: (1, heads, R, E), R the sum of the lengths.
        lengths: rows of each sequence, all above 0.
        scale: of the logits; None is ``1/sqrt(E)``.
        biases: one per sequence, each (1, heads, n, n).
        together: pad sequences of similar length together where they are short and without bias: otherwise the fused
            attention is called once per sequence.

    Returns (1, heads, R, E).
    """
    if together and biases is None and len(lengths) > 1 and max(lengths) <= SHORT:
        return _bucketed(q, k, v, lengths, scale)
    masks = biases or [None] * len(lengths)
    sizes = list(lengths)
    each = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), masks)
    attend = F.scaled_dot_product_attention
    return torch.cat([attend(a, b, c, attn_mask=mask, scale=scale) for a, b, c, mask in each], dim=2)


def _bucketed(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float | None) -> Tensor:
    count = torch.tensor(lengths)
    start = count.cumsum(0) - count
    buckets: dict[int, list[int]] = {}
    for i, n in enumerate(lengths):
        buckets.setdefault(-(-n // BUCKET) * BUCKET, []).append(i)
    out = torch.empty_like(q)
    for width, members in buckets.items():
        chosen = torch.tensor(members)
        column = torch.arange(width)
        real = column < count[chosen, None]  # (b, width)
        place = torch.where(real, start[chosen, None] + column, start[chosen, None])
        padded = [x[0][:, place].transpose(0, 1) for x in (q, k, v)]  # (b, heads, width, E)
        mask = real[:, None, None]
        result = F.scaled_dot_product_attention(padded[0], padded[1], padded[2], attn_mask=mask, scale=scale)
        out[0][:, place[real]] = result.transpose(0, 1)[:, real]
    return out
