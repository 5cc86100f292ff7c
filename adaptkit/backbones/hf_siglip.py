"""transformers' SiglipVisionModel, alone or inside SiglipModel: patch tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import HfViT, clip_block, tower
from adaptkit.backbones._timm import block_list
from adaptkit.core.registry import register_family
from adaptkit.core.view import Block, ViT


@register_family("transformers.models.siglip.modeling_siglip.SiglipVisionModel")
class HfSiglip(HfViT):
    """Blocks ``x + attn(norm(x))``; absolute positions, resampled bicubic without antialias."""

    family = "hf-siglip"
    layers_at = "encoder.layers"
    kernel_at = "embeddings.patch_embedding.weight"
    layer_norms = ("layer_norm1", "layer_norm2")
    last_norm = "post_layernorm"
    interpolates_when_told = True
    positions = "bicubic"
    position_rules = ("bicubic", "bicubic antialias")

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone, prefix=0)

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers."""
        return [clip_block(layer) for layer in block_list(self.layers())]


@register_family("transformers.models.siglip.modeling_siglip.SiglipModel")  # type: ignore[type-var]
def siglip_vision_tower(model: Any) -> ViT:
    """See the vision model inside; the text model stays beside it, unused."""
    return tower(HfSiglip(model.vision_model), model)
