"""timm's NaFlexVit (SigLIP 2 among others), seen at the fixed grid of each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaptkit.backbones._timm import REMEDY, block_list
from adaptkit.backbones._timm_plain import TimmPlain
from adaptkit.backbones.timm_eva import eva_block, rotary_eva_blocks
from adaptkit.backbones.timm_vit import timm_block
from adaptkit.core.block import Block
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped


@register_family("timm.models.naflexvit.NaFlexVit")
class TimmNaFlex(TimmPlain):
    """timm's plain blocks or EVA's; all images of a batch have one size, so nothing is masked."""

    family = "timm-naflex"

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone)
        table = {"learned": f"{backbone.embeds.pos_embed_interp_mode} antialias", "factorized": "linear, by axis"}
        absolute = table.get(backbone.embeds.pos_embed_type, "")
        self.positions = ", ".join(filter(None, ["rope" if backbone.rope is not None else "", absolute])) or "none"
        self.prefix_optional = backbone.rope is None  # timm leaves the first P tokens unrotated, whatever they are
        if not all(hasattr(unwrapped(blk), "attn") for blk in backbone.blocks):
            raise TypeError(f"this NaFlexVit has parallel blocks, which are seen in timm's VisionTransformer; {REMEDY}")

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """``backbone.embeds`` and ``norm_pre``."""
        return self.backbone.norm_pre(self.backbone.embeds(image)[0])

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """timm's own blocks, each given the rotary angles of this grid where there are any."""
        backbone: Any = self.backbone
        layers = block_list(backbone.blocks)
        rope = None if backbone.rope is None else backbone.rope.get_embed(shape=list(grid))
        if rope is None:
            return [eva_block(b, None) if hasattr(unwrapped(b), "gamma_1") else timm_block(b) for b in layers]
        return rotary_eva_blocks(layers, backbone.rope, rope if backbone.rope_is_mixed else [rope] * len(layers), grid)

    def patch_sides(self) -> tuple[int, int]:
        """``backbone.embeds.patch_size``."""
        return self.backbone.embeds.patch_size

    def kernel(self) -> Tensor:
        """(D, C, p, p), of a convolution or of the linear layer on patches."""
        embeds: Any = self.backbone.embeds
        weight, sides = embeds.proj.weight, embeds.patch_size
        if not embeds.is_linear:
            return weight
        if embeds.channels_last:
            return weight.unflatten(1, (*sides, -1)).permute(0, 3, 1, 2)
        return weight.unflatten(1, (-1, *sides))

    def sizes(self) -> Sequence[tuple[int, int]]:
        """That of its table of positions, and another."""
        side = self.spec.patch_size
        rows, columns = self.backbone.embeds.pos_embed_grid_size or (4, 4)
        return (rows * side, columns * side), (3 * side, 5 * side)
