"""transformers' EoMT: the ViT of the mask transformer, seen without its queries, on DINOv2's and on DINOv3's blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.backbones._hf import HfViT, dino_block, is_native
from adaptkit.backbones._timm import block_list, resampled
from adaptkit.backbones.hf_dinov3 import rotary_blocks
from adaptkit.core.block import Block
from adaptkit.core.registry import register_family


class _Eomt(HfViT):
    """Blocks ``x + ls(attn(norm(x)))`` on class token, registers and patches.

    The model joins its queries to the tokens before the last blocks and reads masks off them; the view runs all blocks
    without them, as the backbone they were added to, and an adapter's head stands where they stood.
    """

    layers_at = "layers"
    layer_norms = ("norm1", "norm2")

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone, backbone.embeddings.num_prefix_tokens)

    def sizes(self) -> Sequence[tuple[int, int]]:
        """The backbone's own alone: it makes masks of that size."""
        return [(self.body.config.image_size, self.body.config.image_size)]

    def reference(self, image: Tensor) -> Tensor:
        """``last_hidden_state`` of a copy that has no queries, and so no masks to attend by."""
        backbone: Any = self.backbone
        backbone.config = copy.copy(backbone.config)
        backbone.config.num_queries = 0
        backbone.query = nn.Embedding.from_pretrained(image.new_empty(0, self.spec.embed_dim))
        backbone.attn_mask_probs = torch.zeros_like(backbone.attn_mask_probs)
        return self._forward(image)


@register_family("transformers.models.eomt.modeling_eomt.EomtForUniversalSegmentation")
class HfEomt(_Eomt):
    """With a table of positions, which the backbone takes as it is; at another size bicubic without antialias."""

    family = "hf-eomt"
    positions = "bicubic"

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """``backbone.embeddings``; at another size its parts, with the resampled table."""
        embeddings: Any = self.body.embeddings
        if is_native(image, self.body.config.image_size):
            return embeddings(image)
        x = embeddings.patch_embeddings(image) + resampled(embeddings.position_embeddings.weight[None], grid)
        prefix = [t.expand(x.shape[0], -1, -1) for t in (embeddings.cls_token, embeddings.register_tokens)]
        return embeddings.dropout(torch.cat([*prefix, x], dim=1))

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers."""
        return [dino_block(layer, "out_proj", "scale") for layer in block_list(self.layers())]


@register_family("transformers.models.eomt_dinov3.modeling_eomt_dinov3.EomtDinov3ForUniversalSegmentation")
class HfEomtDINOv3(_Eomt):
    """With rotary positions, patch centres given as -1..1 on any grid."""

    family = "hf-eomt-dinov3"
    kernel_at = "embeddings.patch_embeddings.weight"
    positions = "rope"

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """``backbone.embeddings``, which has no positions."""
        return self.body.dropout(self.body.embeddings(image))

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers, given the rotary angles of this grid."""
        return rotary_blocks(self.layers(), self.body.rope_embeddings, image, grid)
