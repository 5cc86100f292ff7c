"""transformers' Dinov2Model and Dinov2Backbone, without and with registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import HfViT, dino_block
from adaptkit.backbones._timm import block_list
from adaptkit.core.block import Block
from adaptkit.core.registry import register_family


@register_family(
    "transformers.models.dinov2.modeling_dinov2.Dinov2Model",
    "transformers.models.dinov2.modeling_dinov2.Dinov2Backbone",
)
class HfDinov2(HfViT):
    """Blocks ``x + ls(attn(norm(x)))``; absolute positions, resampled bicubic without antialias."""

    family = "hf-dinov2"
    layer_norms = ("norm1", "norm2")
    positions = "bicubic"
    position_rules = ("bicubic", "bicubic antialias")

    def __init__(self, backbone: Any) -> None:
        registers = getattr(backbone.embeddings, "register_tokens", None)
        super().__init__(backbone, 1 if registers is None else 1 + registers.shape[1])

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's layers."""
        return [dino_block(layer) for layer in block_list(self.layers())]


@register_family(
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersBackbone",
)
class HfDinov2WithRegisters(HfDinov2):
    """The same with register tokens, and positions resampled with antialias, as its authors trained it."""

    positions = "bicubic antialias"
