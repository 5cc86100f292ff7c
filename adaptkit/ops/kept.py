"""Attention in which some tokens are off: masked, as the reference, and packed, without the rows that are off."""

from __future__ import annotations

import importlib.util
import math
from array import array
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.ops.device import eager_cpu

__all__ = ["SHORT", "attention", "index", "masked_attention", "packed_attention", "packed_backend"]

FAR = 20.0  #: logits of an off key above the largest kept one count no further: exp(20) bounds the gradient
SHORT = 48  #: rows up to which, on a CPU, calling for each sequence costs more than padding to one length
UNFUSED = 160  #: rows up to which, on a CPU, two products and a softmax beat the fused kernel
BUCKET = 8  #: sequences whose lengths share a multiple of this are padded to one length


def index(places: Sequence[int]) -> Tensor:
    """``torch.tensor(places)``, (n,) int64 on the CPU, in a fifth of its time."""
    return torch.frombuffer(array("q", places), dtype=torch.int64) if places else torch.zeros(0, dtype=torch.int64)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """``F.scaled_dot_product_attention`` of one image, (1, heads, R, E), by the fastest way there is without gradients.

    ``bias`` is added to the logits, (1, heads, R, R).
    """
    plain = bias is None and not torch.is_grad_enabled() and not torch.is_autocast_enabled(q.device.type)
    if not plain or not eager_cpu(q) or q.dtype != torch.float32 or k.shape[2] > UNFUSED:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    logits = torch.baddbmm(q.new_zeros(1), q[0], k[0].transpose(1, 2), beta=0, alpha=scale)
    return torch.bmm(torch.softmax(logits, -1), v[0])[None]


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """Attention over the kept keys.

    Args:
        q, k, v: (B, heads, T, E).
        keep: (B, T) of zeros and ones. Where it requires a gradient it gets one: that of the softmax restricted to
            kept keys, of which 0 and 1 are the values.
        scale: of the logits; None is ``1/sqrt(E)``.
        bias: added to the logits, broadcast to (B, heads, T, T).

    Returns (B, heads, T, E). An image without a kept key is attended to as a whole, and nobody reads that.
    """
    if keep.requires_grad:
        logits = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        return _softmax(logits if bias is None else logits + bias, keep[:, None, None]).to(v.dtype) @ v
    on = keep > 0
    on = (on | ~on.any(1, keepdim=True))[:, None, None]  # (B, 1, 1, T)
    mask = on if bias is None else bias.masked_fill(~on, -math.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _softmax(logits: Tensor, keep: Tensor) -> Tensor:
    """Softmax over kept keys; equal to masking by -inf where ``keep`` is 0 or 1, and differentiable in ``keep``."""
    largest = logits.detach().masked_fill(keep <= 0, -math.inf).amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    weights = (logits - largest).clamp(max=FAR).exp() * keep.to(logits.dtype)
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)


def packed_backend(q: Tensor, bias: Tensor | None, lengths: Sequence[int], padded: bool) -> str:
    """Name the way for these tensors: ``"each"`` sequence by itself, ``"varlen"``, or ``"bucket"`` by length.

    On a CPU short sequences go into buckets where ``padded`` allows it.
    """
    if bias is not None or len(lengths) == 1:
        return "each"
    if eager_cpu(q):
        return "bucket" if padded and max(lengths) <= SHORT else "each"
    half = q.dtype in (torch.float16, torch.bfloat16)
    return "varlen" if half and q.is_cuda and importlib.util.find_spec("torch.nn.attention.varlen") else "bucket"


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scale: float | None = None,
    biases: Sequence[Tensor] | None = None,
    backend: str = "each",
) -> Tensor:
    """Attention inside each of several sequences that are laid end to end.

    Args:
        q, k, v: (1, heads, R, E), R the sum of the lengths.
        lengths: rows of each sequence, all above 0.
        scale: of the logits; None is ``1/sqrt(E)``.
        biases: one per sequence, each (1, heads, n, n); only with ``backend="each"``.
        backend: ``"each"`` calls the fused attention once per sequence (the best on a CPU); ``"varlen"`` is one
            flash kernel (CUDA, half precision); ``"bucket"`` pads sequences of similar length together.

    Returns (1, heads, R, E).
    """
    if backend == "each":
        masks = biases or [None] * len(lengths)
        sizes = list(lengths)
        each = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), masks)
        attend = F.scaled_dot_product_attention
        return torch.cat([attend(a, b, c, attn_mask=mask, scale=scale) for a, b, c, mask in each], dim=2)
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        edges = torch.tensor([0, *lengths], device=q.device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        rows = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]  # (R, heads, E)
        longest = max(lengths)
        return varlen_attn(*rows, edges, edges, longest, longest, scale=scale).transpose(0, 1)[None]
    return _bucketed(q, k, v, lengths, scale)


def _bucketed(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float | None) -> Tensor:
    count = torch.tensor(lengths, device=q.device)
    start = count.cumsum(0) - count
    buckets: dict[int, list[int]] = {}
    for i, n in enumerate(lengths):
        buckets.setdefault(-(-n // BUCKET) * BUCKET, []).append(i)
    out = torch.empty_like(q)
    for width, members in buckets.items():
        chosen = torch.tensor(members, device=q.device)
        column = torch.arange(width, device=q.device)
        real = column < count[chosen, None]  # (b, width)
        place = torch.where(real, start[chosen, None] + column, start[chosen, None])
        padded = [x[0][:, place].transpose(0, 1) for x in (q, k, v)]  # (b, heads, width, E)
        mask = real[:, None, None]
        result = F.scaled_dot_product_attention(padded[0], padded[1], padded[2], attn_mask=mask, scale=scale)
        out[0][:, place[real]] = result.transpose(0, 1)[:, real]
    return out
