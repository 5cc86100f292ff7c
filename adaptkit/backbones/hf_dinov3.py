"""transformers' DINOv3ViTModel and DINOv3ViTBackbone: class and register tokens, rotary positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import HfViT, dino_block, project_qkv
from adaptkit.backbones._rotary import axial, rows_at
from adaptkit.backbones._timm import block_list
from adaptkit.core.block import Block, no_projections
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped


@register_family(
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel",
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTBackbone",
)
class HfDINOv3(HfViT):
    """Blocks ``x + ls(attn(norm(x), rope))``; patch centres are given as -1..1 on any grid."""

    family = "hf-dinov3"
    layers_at = "model.layer"
    kernel_at = "embeddings.patch_embeddings.weight"
    layer_norms = ("norm1", "norm2")
    last_norm = "norm"
    positions = "rope"

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone, 1 + backbone.embeddings.register_tokens.shape[1])

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers, given the rotary angles of this grid."""
        return rotary_blocks(self.layers(), self.body.rope_embeddings, image, grid)


def rotary_blocks(layers: Any, positions: Any, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
    """Layers as in DINOv3, given the rotary angles that ``positions`` makes for this image."""
    layers, rope = block_list(layers), positions(image)
    blocks = [dino_block(layer, position_embeddings=rope) for layer in layers]
    return [
        replace(
            block,
            qkv=partial(_qkv, unwrapped(unwrapped(layer).attention), rope),
            qkv_at=partial(_qkv_at, unwrapped(unwrapped(layer).attention), rope),
            rotate=partial(_turn, positions, grid),
            projections=no_projections,
        )
        for block, layer in zip(blocks, layers)
    ]


def _turn(rope: Any, grid: tuple[int, int], x: Tensor, places: Tensor) -> Tensor:
    """Turn rows made without a place to continuous ones: a cell's centre is (2i + 1) / n - 1, times 2 pi."""
    frequencies = 2 * math.pi * rope.inv_freq
    origins, steps = (1 / grid[0] - 1, 1 / grid[1] - 1), (2 / grid[0], 2 / grid[1])
    return axial(frequencies, origins, steps, yx=True, half=True).turn(x, places)


def _qkv_at(attn: Any, rope: tuple[Tensor, Tensor], h: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the rows at these places."""
    return _qkv(attn, rows_at(*rope, places), h)


def _qkv(attn: Any, rope: tuple[Tensor, Tensor], h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

    q, k, v = project_qkv(attn, h)
    q, k = apply_rotary_pos_emb(q, k, *rope)
    return q, k, v
