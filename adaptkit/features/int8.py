"""Features in eight bits: each token in groups of channels, each group with a scale of its own.

    s = max |x| / 127,    q = round(x / s),    |x - s q| <= s / 2        for 32 channels x of one token

Symmetric, so that zero stays zero. A few channels of a ViT are far larger than the rest (Sun et al., Massive
Activations in Large Language Models, 2024): with one scale for a whole token they would take the bits of all others.
The scale is a bfloat16, whose range is that of float32: rounded by at most 2^-8, it leaves max |x| below 127.5 steps,
which become 127. A group costs 32 + 2 bytes in place of 64 in float16.

The error of a value is uniform in half a step either way, s / sqrt(12) in quadratic mean: 0.5 % of the standard
deviation of 32 channels that are normally distributed. Measured after the blocks 2, 5, 8 and 11 of DINOv2 ViT-S it is
0.6 to 0.9 % of the features, and 1.5 % at most after the final norm, which makes large channels small; float16 is off
by 0.02 %.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GROUP", "dequantise", "quantise"]

GROUP = 32  #: channels of one scale
MOST = 127


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (..., D), int8, and the scales (..., ceil(D / GROUP)), bfloat16, of features (..., D).

    Raises ``ValueError`` for what is not finite: no scale would tell.
    """
    x = x.float()
    if not x.isfinite().all():
        raise ValueError("the features have values that are not finite, which eight bits cannot hold; keep float32")
    groups = F.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1) / MOST).bfloat16()
    # Where all is zero, or so small that the scale is, any step gives zeros.
    step = torch.where(scale > 0, scale, 1).float()
    q = (groups / step[..., None]).round().clamp(-MOST, MOST)
    return q.to(torch.int8).flatten(-2)[..., : x.shape[-1]].contiguous(), scale


def dequantise(q: Tensor, scale: Tensor) -> Tensor:
    """Return the features (..., D), float32, that :func:`quantise` made these of."""
    return q.float() * scale.float().repeat_interleave(GROUP, -1)[..., : q.shape[-1]]
