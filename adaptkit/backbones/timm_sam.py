"""timm's VisionTransformerSAM: the image encoder of Segment Anything, windowed and global attention on a map."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from adaptkit.backbones._maps import no_qkv, on_map, windowed
from adaptkit.backbones._timm import block_list, joined, patchify
from adaptkit.backbones._timm_plain import TimmPlain
from adaptkit.core.block import Block
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.ops.grid import map_to_tokens


@register_family("timm.models.vision_transformer_sam.VisionTransformerSAM")
class TimmSam(TimmPlain):
    """Blocks on a map (B, h, w, D), given and taken as tokens. No class token.

    A neck of convolutions to 256 channels is left to the backbone: tokens are then what the last block gives, without a
    norm, and there are no logits. Built without one (``neck_chans=None``, as ``samvit_base_patch16_224``), the neck is
    timm's name for the final norm.

    Attention does not come apart into ``qkv``, ``bias`` and ``out``: windows are padded with keys that are no
    patch, and the relative positions are multiplied with the query. Those parts raise a ``TypeError``.
    """

    family = "timm-sam"
    positions = "bicubic antialias, relative ones linear"
    splits = False

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone)
        if backbone.pos_embed is None:
            relative = any(getattr(unwrapped(blk).attn, "use_rel_pos", False) for blk in backbone.blocks)
            self.positions = "relative ones linear" if relative else "none"

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

    @property
    def has_neck(self) -> bool:
        """Whether there are convolutions behind the last block, to another width."""
        return isinstance(unwrapped(self.backbone.neck), nn.Sequential)

    def norm(self, x: Tensor) -> Tensor:
        """``backbone.neck`` where it is the final norm; the identity where it is more than that."""
        neck: Any = self.backbone.neck
        return x if self.has_neck else neck(_as_map(x)).squeeze(3).mT

    def classify(self, x: Tensor) -> Tensor | None:
        """``backbone.forward_head``; None where the backbone classifies what leaves its convolutions."""
        return None if self.has_neck else super().classify(_as_map(x))

    def answers(self, tokens: Tensor) -> Sequence[Tensor]:
        """As elsewhere; nothing where the backbone pools what leaves its convolutions."""
        return () if self.has_neck else (self.backbone.forward_head(_as_map(tokens)), tokens)

    def reference(self, image: Tensor) -> Tensor:
        """``backbone.forward_features``, of a copy whose convolutions are taken off."""
        backbone: Any = self.backbone
        if not self.has_neck:
            return map_to_tokens(backbone.forward_features(image))
        neck, backbone.neck = backbone.neck, nn.Identity()
        tokens = map_to_tokens(backbone.forward_features(image))
        backbone.neck = neck
        return tokens


def _as_map(x: Tensor) -> Tensor:
    """Tokens (B, N, D) -> a map (B, D, N, 1) of one column: norm and pooling do not ask where a token lies."""
    return x.mT.unsqueeze(3)


def _block(outer: Any, grid: tuple[int, int]) -> Block:
    """``outer``: the block as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    blk: Any = unwrapped(outer)
    return Block(
        run=partial(on_map, outer, grid),
        norm1=blk.norm1,
        attn=partial(on_map, partial(windowed, blk.attn, blk.window_size), grid),
        scale1=joined(blk.ls1, blk.drop_path1),
        norm2=blk.norm2,
        mlp=blk.mlp,
        scale2=joined(blk.ls2, blk.drop_path2),
        qkv=no_qkv,
        out=no_qkv,
    )
