"""timm's VisionTransformerSAM: the image encoder of Segment Anything, windowed and global attention on a map."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from adaptkit.backbones._timm import (
    block_list,
    channels,
    head_count,
    is_checkpointing,
    joined,
    patch_side,
    patchify,
    timm_sizes,
    timm_source,
)
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import Block, Source, Spec, ViT


@register_family("timm.models.vision_transformer_sam.VisionTransformerSAM")
class TimmSam(ViT):
    """Blocks on a map (B, h, w, D), given and taken as tokens. No class token and no final norm.

    The neck, a small convolutional head to 256 channels, is left to the backbone: tokens are what the last block gives.
    Attention does not come apart into ``qkv``, ``bias`` and ``out``: windows are padded with keys that are no
    patch, and the relative positions are multiplied with the query. Those parts raise a ``TypeError``.
    """

    positions = "bicubic antialias, relative ones linear"
    splits = False

    def __init__(self, backbone: Any) -> None:
        heads = head_count(backbone)
        spec = Spec(
            "timm-sam", backbone.embed_dim, len(backbone.blocks), heads, patch_side(backbone), 0, channels(backbone)
        )
        super().__init__(backbone, spec)

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches, positions, ``norm_pre``."""
        from timm.layers import resample_abs_pos_embed_nhwc

        backbone: Any = self.backbone
        x = patchify(backbone, image)
        if backbone.pos_embed is not None:
            x = x + resample_abs_pos_embed_nhwc(backbone.pos_embed, list(grid)).flatten(1, 2)
        return backbone.norm_pre(x)

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """timm's own blocks, tokens unfolded to this grid."""
        return [_block(blk, grid) for blk in block_list(self.backbone.blocks)]

    def norm(self, x: Tensor) -> Tensor:
        """The identity: SAM has a neck where others have a norm."""
        return x

    def classify(self, x: Tensor) -> Tensor | None:
        """None: the backbone classifies what leaves its neck."""
        return None

    def is_checkpointing(self) -> bool:
        """As ``set_grad_checkpointing`` left it."""
        return is_checkpointing(self.backbone)

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        backbone: Any = self.backbone
        first, last = unwrapped(backbone.blocks[0]), unwrapped(backbone.blocks[-1])
        return {"patch": backbone.patch_embed.proj.weight, "first": first.norm1.weight, "last": last.norm2.weight}

    def source(self) -> Source:
        """From ``pretrained_cfg``."""
        return timm_source(self)

    def sizes(self) -> Sequence[tuple[int, int]]:
        """The backbone's own, and another."""
        return timm_sizes(self.backbone)

    def reference(self, image: Tensor) -> Tensor:
        """``backbone.forward_features`` of a copy, its neck taken off."""
        backbone: Any = self.backbone
        neck, backbone.neck = backbone.neck, nn.Identity()
        tokens = backbone.forward_features(image).flatten(2).transpose(1, 2)
        backbone.neck = neck
        return tokens


def _block(outer: Any, grid: tuple[int, int]) -> Block:
    """``outer``: the block as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    blk: Any = unwrapped(outer)
    return Block(
        run=partial(_on_map, outer, grid),
        norm1=blk.norm1,
        attn=partial(_on_map, partial(_windowed, blk), grid),
        scale1=joined(blk.ls1, blk.drop_path1),
        norm2=blk.norm2,
        mlp=blk.mlp,
        scale2=joined(blk.ls2, blk.drop_path2),
        qkv=_refuse,
        out=_refuse,
    )


def _on_map(f: Any, grid: tuple[int, int], x: Tensor) -> Tensor:
    return f(x.unflatten(1, grid)).flatten(1, 2)


def _windowed(blk: Any, x: Tensor) -> Tensor:
    """(B, h, w, D) -> the same, attention inside windows where the block has them."""
    from timm.models.vision_transformer_sam import window_partition, window_unpartition

    side = blk.window_size
    if side == 0:
        return blk.attn(x)
    windows, padded = window_partition(x, side)
    return window_unpartition(blk.attn(windows), side, x.shape[1:3], padded)


def _refuse(x: Tensor) -> Any:
    raise TypeError(
        "SAM attends inside padded windows, with positions that depend on the query: it has no global q, k, v and "
        "bias; use an adapter that leaves the inside of the attention alone"
    )
