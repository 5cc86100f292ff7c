"""The original DINOv2: ``torch.hub.load("facebookresearch/dinov2", ...)``, by the names of its attributes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from adaptkit.backbones._dino_hub import COMMON, DinoHub, dino_hub_block
from adaptkit.backbones._timm import by_head, fused_qkv, is_bare
from adaptkit.core.block import Block, Projections
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped


@register_family("dinov2.models.vision_transformer.DinoVisionTransformer", having=(*COMMON, "pos_embed"))
class DINOv2Hub(DinoHub):
    """Absolute positions, which the backbone resamples itself, by its own ``interpolate_pos_encoding``."""

    positions = "bicubic"

    def __init__(self, backbone: Any) -> None:
        registers = getattr(backbone, "register_tokens", None)
        super().__init__(backbone, "dinov2-hub", 0 if registers is None else registers.shape[1])
        if getattr(backbone, "interpolate_antialias", False):
            self.positions = "bicubic antialias"

    def prepared(self, image: Tensor) -> Tensor:
        """``backbone.prepare_tokens_with_masks``."""
        return self.backbone.prepare_tokens_with_masks(image)

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's own blocks."""
        return [_block(blk) for blk in self.layers()]


def _block(outer: Any) -> Block:
    """``outer``: the block as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    parts = dino_hub_block(outer)
    attn: Any = unwrapped(unwrapped(outer).attn)
    return Block(qkv=partial(fused_qkv, attn), projections=partial(_projections, unwrapped(outer).attn), **parts)


def _projections(attn: Any) -> Projections | None:
    """Return the weights by head; None where a layer is no plain linear one, LoRA for instance."""
    return by_head(attn.qkv, attn.proj, attn.num_heads) if is_bare(attn, type(unwrapped(attn))) else None
