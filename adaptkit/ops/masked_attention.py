"""Attention among kept tokens, the others masked: with a gradient for what is kept."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.seam import is_transformed

__all__ = ["masked_attention"]

FAR = 20.0  #: logits of an off key above the largest kept one count no further: exp(20) bounds the gradient


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
    if keep.requires_grad or is_transformed():  # in forward mode nothing requires a gradient
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
