"""timm's NaFlexVit (SigLIP 2 among others), seen at the fixed grid of each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from adaptkit.backbones._timm import (
    REMEDY,
    block_list,
    classifier_logits,
    head_count,
    is_checkpointing,
    timm_answers,
    timm_source,
)
from adaptkit.backbones.timm_eva import eva_block, turned
from adaptkit.backbones.timm_vit import timm_block
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import Block, Source, Spec, ViT


@register_family("timm.models.naflexvit.NaFlexVit")
class TimmNaFlex(ViT):
    """timm's plain blocks or EVA's; all images of a batch have one size, so nothing is masked."""

    def __init__(self, backbone: Any) -> None:
        height, width = backbone.embeds.patch_size
        if height != width:
            raise TypeError(f"patches of {height}x{width} pixels are not square; an adapter needs one patch side")
        sizes = (backbone.embed_dim, len(backbone.blocks), head_count(backbone), height, backbone.num_prefix_tokens)
        super().__init__(backbone, Spec("timm-naflex", *sizes, backbone.embeds.in_chans))
        table = {"learned": f"{backbone.embeds.pos_embed_interp_mode} antialias", "factorized": "linear, by axis"}
        absolute = table.get(backbone.embeds.pos_embed_type, "")
        self.positions = ", ".join(filter(None, ["rope" if backbone.rope is not None else "", absolute])) or "none"
        self.prefix_optional = backbone.rope is None  # timm leaves the first P tokens unrotated, whatever they are
        blocks = [unwrapped(blk) for blk in backbone.blocks]
        if not all(hasattr(blk, "attn") for blk in blocks):
            raise TypeError(f"this NaFlexVit has parallel blocks, which are seen in timm's VisionTransformer; {REMEDY}")
        self.splits = all(getattr(unwrapped(blk.attn), "gate", None) is None for blk in blocks)

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
        angles = rope if backbone.rope_is_mixed else [rope] * len(layers)
        blocks = [eva_block(blk, turn) for blk, turn in zip(layers, angles)]
        return [replace(b, rotate=partial(turned, backbone.rope, grid, i)) for i, b in enumerate(blocks)]

    def norm(self, x: Tensor) -> Tensor:
        """``backbone.norm``; the identity where timm norms after pooling (``fc_norm``)."""
        return self.backbone.norm(x)

    def classify(self, x: Tensor) -> Tensor | None:
        """``backbone.forward_head`` where it has classes."""
        return classifier_logits(self.backbone, x)

    def is_checkpointing(self) -> bool:
        """As ``set_grad_checkpointing`` left it."""
        return is_checkpointing(self.backbone)

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        backbone: Any = self.backbone
        first, last = unwrapped(backbone.blocks[0]), unwrapped(backbone.blocks[-1])
        return {"patch": self._kernel(), "first": first.norm1.weight, "last": last.norm2.weight}

    def _kernel(self) -> Tensor:
        """(D, C, p, p), of a convolution or of the linear layer on patches."""
        embeds: Any = self.backbone.embeds
        weight, sides = embeds.proj.weight, embeds.patch_size
        if not embeds.is_linear:
            return weight
        if embeds.channels_last:
            return weight.unflatten(1, (*sides, -1)).permute(0, 3, 1, 2)
        return weight.unflatten(1, (-1, *sides))

    def source(self) -> Source:
        """From ``pretrained_cfg``."""
        return timm_source(self)

    def sizes(self) -> Sequence[tuple[int, int]]:
        """That of its table of positions, and another."""
        side = self.spec.patch_size
        rows, columns = self.backbone.embeds.pos_embed_grid_size or (4, 4)
        return (rows * side, columns * side), (3 * side, 5 * side)

    def reference(self, image: Tensor) -> Tensor:
        """``backbone.forward_features``."""
        return self.backbone.forward_features(image)

    def answers(self, tokens: Tensor) -> Sequence[Tensor]:
        """``backbone.forward_head`` of them, or the tokens."""
        return timm_answers(self.backbone, tokens)
