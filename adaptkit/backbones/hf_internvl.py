"""transformers' InternVLVisionModel: a ViT with LayerScale, and in the large one a norm over q and over k."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from adaptkit.backbones._hf import HfViT, attention_parts, mlp_layers
from adaptkit.backbones._timm import block_list, joined, layer_scale
from adaptkit.core.block import Block, no_projections
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped


@register_family("transformers.models.internvl.modeling_internvl.InternVLVisionModel")
class HfInternVL(HfViT):
    """Blocks ``lambda * attn(norm(x)) + x``; absolute positions, resampled bicubic without antialias."""

    family = "hf-internvl"
    positions = "bicubic"

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers."""
        return [_block(layer) for layer in block_list(self.layers())]


def _block(outer: Any) -> Block:
    """``outer``: the layer as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    layer: Any = unwrapped(outer)
    attn: Any = unwrapped(layer.attention)
    parts = attention_parts(layer.attention, "projection_layer", "scale")
    if not isinstance(attn.q_norm, nn.Identity):
        parts["projections"] = no_projections  # the norm spans the heads
    parts["qkv"] = partial(_qkv, attn)
    parts["out"] = joined(parts["out"], attn.projection_dropout)
    return Block(
        run=outer,
        norm1=layer.layernorm_before,
        scale1=layer_scale(layer.lambda_1),
        norm2=layer.layernorm_after,
        mlp=layer.mlp,
        mlp_layers=partial(mlp_layers, layer.mlp),
        scale2=joined(layer.dropout, layer_scale(layer.lambda_2)),
        **parts,
    )


def _qkv(attn: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, P+N, D) -> three of (B, heads, P+N, E)."""
    parts = attn.q_norm(attn.q_proj(h)), attn.k_norm(attn.k_proj(h)), attn.v_proj(h)
    q, k, v = (part.unflatten(2, (-1, attn.head_dim)).transpose(1, 2) for part in parts)
    return q, k, v
