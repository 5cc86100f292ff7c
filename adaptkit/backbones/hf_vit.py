"""transformers' ViTModel and its siblings: DeiT (with its distillation token), ViT-MSN, I-JEPA (no class token)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import HfViT, vit_block
from adaptkit.backbones._timm import block_list
from adaptkit.core.block import Block
from adaptkit.core.registry import register_family


@register_family(
    "transformers.models.vit.modeling_vit.ViTModel",
    "transformers.models.deit.modeling_deit.DeiTModel",
    "transformers.models.vit_msn.modeling_vit_msn.ViTMSNModel",
    "transformers.models.ijepa.modeling_ijepa.IJepaModel",
)
class HfPlainViT(HfViT):
    """Blocks ``x + attn(norm(x))``; absolute positions, resampled bicubic without antialias."""

    family = "hf-vit"
    layers_at = "layers"
    interpolates_when_told = True
    positions = "bicubic"
    position_rules = ("bicubic", "bicubic antialias")

    def __init__(self, backbone: Any) -> None:
        embeddings = backbone.embeddings
        super().__init__(backbone, embeddings.position_embeddings.shape[1] - embeddings.patch_embeddings.num_patches)

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers."""
        return [vit_block(layer) for layer in block_list(self.layers())]
