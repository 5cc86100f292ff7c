"""transformers' BLIP, BLIP-2 and InstructBLIP: their vision models, with one layer for q, k and v."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import HfClipNames, attend, mlp_layers
from adaptkit.backbones._timm import block_list, by_head, fused_qkv, is_bare, merge_heads
from adaptkit.core.block import Block, Projections, identity
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped


@register_family(
    "transformers.models.blip.modeling_blip.BlipVisionModel",
    "transformers.models.blip_2.modeling_blip_2.Blip2VisionModel",
    "transformers.models.instructblip.modeling_instructblip.InstructBlipVisionModel",
    "transformers.models.instructblipvideo.modeling_instructblipvideo.InstructBlipVideoVisionModel",
)
class HfBlip(HfClipNames):
    """Blocks ``attn(norm(x)) + x``; absolute positions, resampled bicubic without antialias."""

    family = "hf-blip"
    interpolates_when_told = True
    positions = "bicubic"

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers."""
        return [_block(layer) for layer in block_list(self.layers())]


def _block(outer: Any) -> Block:
    """``outer``: the layer as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    layer: Any = unwrapped(outer)
    attn: Any = unwrapped(layer.self_attn)
    return Block(
        run=outer,
        norm1=layer.layer_norm1,
        attn=partial(attend, layer.self_attn, {}),
        scale1=identity,
        norm2=layer.layer_norm2,
        mlp=layer.mlp,
        scale2=identity,
        qkv=partial(fused_qkv, attn),
        out=partial(merge_heads, attn.projection),
        scale=attn.scale,
        projections=partial(_projections, layer.self_attn),
        mlp_layers=partial(mlp_layers, layer.mlp),
    )


def _projections(attn: Any) -> Projections | None:
    """Return the weights by head; None where a layer is no plain linear one, LoRA for instance."""
    bare = is_bare(attn, type(unwrapped(attn)))
    return by_head(attn.qkv, attn.projection, attn.num_heads) if bare else None
