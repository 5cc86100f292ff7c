"""One block under a decision, everything computed and masked: the definition (AdaViT, section 3).

With t the decision for each token and m_msa, m_ffn those for the sub-layers, 0 or 1::

    x = x + t * m_msa * scale1(attn(norm1(x)))      attention among kept tokens
    x = x + t * m_ffn * scale2(mlp(norm2(x)))

An off token, sub-layer or image passes by unchanged. An off head gives zero (``"full"``) or each token's own value
(``"partial"``); the output projection keeps its bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.adapters.adavit.gates import Decision
from adaptkit.adapters.adavit.layouts import Layouts
from adaptkit.core.block import Block
from adaptkit.ops.masked_attention import masked_attention

__all__ = ["How", "Masks", "masked", "num_prefix_tokens", "select_heads"]


class How(NamedTuple):
    """How a block is run, whatever is decided."""

    head_mode: str  #: "full" or "partial"
    #: Patch tokens are read as keys and values but not updated: all that a class-token classifier needs of the last
    #: block.
    only_prefix: bool = False
    layouts: Layouts | None = None  #: of the weights; only a fast path looks at them


def masked(block: Block, x: Tensor, h: Tensor, decision: Decision, how: How) -> Tensor:
    """Tokens x (B, T, D) and h = norm1(x) -> (B, T, D), differentiable in the decision."""
    masks = Masks.of(block, x, decision, how)
    q, k, v = block.qkv(h)  # (B, H, T, E)
    o = masked_attention(q, k, v, masks.keys, block.scale, block.bias)
    o = select_heads(o, v, decision.head, how.head_mode)
    x = x + masks.msa[..., None].to(x.dtype) * block.scale1(block.out(o))
    return x + masks.ffn[..., None].to(x.dtype) * block.scale2(block.mlp(block.norm2(x)))


class Masks(NamedTuple):
    """A decision token by token, each (B, T) of zeros and ones."""

    keys: Tensor  #: tokens that are attended to: the kept ones, with MSA on or off
    msa: Tensor  #: tokens that MSA updates
    ffn: Tensor  #: tokens that the FFN updates

    @staticmethod
    def of(block: Block, x: Tensor, decision: Decision, how: How) -> Masks:
        """Of a block's decision about tokens x (B, T, D)."""
        tokens, prefix = x.shape[1], num_prefix_tokens(block, x)
        if decision.patch is None:
            keys = x.new_ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
        else:
            keys = F.pad(decision.patch, (prefix, 0), value=1.0)  # class and register tokens are always kept
        update = keys * (torch.arange(tokens, device=x.device) < prefix) if how.only_prefix else keys
        if decision.layer is None:
            return Masks(keys, update, update)
        msa, ffn = decision.layer[:, :, None].unbind(1)  # (B, 1)
        return Masks(keys, update * msa, update * ffn)


def select_heads(o: Tensor, v: Tensor, head: Tensor | None, head_mode: str) -> Tensor:
    """Outputs o and values v of all heads (B, H, T, E), decision (B, H) -> outputs (B, H, T, E)."""
    if head is None:
        return o
    on = head[:, :, None, None].to(o.dtype)
    return o * on + v * (1 - on) if head_mode == "partial" else o * on


def num_prefix_tokens(block: Block, x: Tensor) -> int:
    """How many of the tokens (B, T, D) are class and register tokens."""
    return x.shape[1] - (0 if block.grid is None else block.grid[0] * block.grid[1])
