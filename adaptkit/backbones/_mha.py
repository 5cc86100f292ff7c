"""torch's MultiheadAttention, in the names of a Block."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from adaptkit.backbones._timm import is_bare, merge_heads, split_qkv
from adaptkit.core.block import Projections, identity
from adaptkit.core.tree import unwrapped

__all__ = ["mha_parts"]


def mha_parts(outer: Any) -> dict[str, Any]:
    """``attn``, ``qkv``, ``out`` and ``projections`` of a Block; ``TypeError`` where it takes the batch second."""
    attn: Any = unwrapped(outer)
    if not attn.batch_first or attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
        raise TypeError(
            "this MultiheadAttention takes (N, B, D), or has keys of its own beside those of the tokens; build the "
            "model with batch_first=True, one width, and neither add_bias_kv nor add_zero_attn"
        )
    return {
        "attn": partial(_attend, outer),
        "qkv": partial(_qkv, attn),
        "out": partial(merge_heads, attn.out_proj),
        "projections": partial(_projections, outer),
    }


def _attend(attn: Any, h: Tensor) -> Tensor:
    return attn(h, h, h, need_weights=False)[0]


def _qkv(attn: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return split_qkv(linear(h, attn.in_proj_weight, attn.in_proj_bias), attn.num_heads)


def _projections(attn: Any) -> Projections | None:
    """Return the weights by head; None where another class or a hook acts (LoRA)."""
    if not is_bare(attn, nn.MultiheadAttention):
        return None
    heads, dim = attn.num_heads, attn.embed_dim
    weight = attn.in_proj_weight.view(3, heads, dim // heads, dim)
    bias = None if attn.in_proj_bias is None else attn.in_proj_bias.view(3, heads, dim // heads)
    out = attn.out_proj.weight.view(dim, heads, dim // heads)
    return Projections((weight,), (bias,), (identity, identity), out, attn.out_proj.bias)
