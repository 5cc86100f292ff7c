"""timm's plain VisionTransformer: ViT, DeiT (1 to 3, distilled), MAE, DINO, DINOv2 (registers too), CLIP, hybrids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from adaptkit.backbones._parallel import is_parallel, parallel_block
from adaptkit.backbones._timm import (
    REMEDY,
    add_prefix_and_positions,
    block_list,
    by_head,
    class_name,
    is_bare,
    is_named,
    joined,
    mlp_layers,
    patchify,
    split_qkv,
)
from adaptkit.backbones._timm_plain import TimmPlain
from adaptkit.core.block import Block, Fn, Projections, identity
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped


@register_family(
    "timm.models.vision_transformer.VisionTransformer",
    "timm.models.deit.VisionTransformerDistilled",
)
class TimmViT(TimmPlain):
    """Blocks ``x + ls(attn(norm(x)))``; absolute positions, resampled bicubic with antialias as timm does."""

    family = "timm-vit"
    positions = "bicubic antialias"
    position_rules = ("bicubic antialias", "bicubic")

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches, prefix, positions, CLIP's ``norm_pre``."""
        backbone: Any = self.backbone
        antialias = self.positions == "bicubic antialias"
        return backbone.norm_pre(add_prefix_and_positions(backbone, patchify(backbone, image), grid, antialias))

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """timm's own blocks."""
        return [timm_block(blk) for blk in block_list(self.backbone.blocks)]


def timm_block(outer: Any) -> Block:
    """``outer``: the block as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    blk: Any = unwrapped(outer)
    if is_parallel(blk):
        return parallel_block(outer, blk)
    if not all(hasattr(blk, part) for part in ("norm1", "attn", "norm2", "mlp")):
        raise TypeError(f"timm's {class_name(blk)} is not of the form x + attn(norm(x)), x + mlp(norm(x)); {REMEDY}")
    attn = unwrapped(blk.attn)
    parts = {
        "attn": blk.attn,
        "mlp": blk.mlp,
        "qkv": partial(_qkv, attn),
        "out": partial(_out, attn),
        "projections": partial(_projections, blk.attn),
        "mlp_layers": partial(mlp_layers, blk.mlp),
    }
    scale1, scale2 = _scales(blk, "ls1", "drop_path1"), _scales(blk, "ls2", "drop_path2")
    if is_named(blk, "ResPostBlock"):  # x + norm(attn(x)): the norm as LayerScale
        return Block(run=outer, norm1=identity, scale1=blk.norm1, norm2=identity, scale2=blk.norm2, **parts)
    return Block(run=outer, norm1=blk.norm1, scale1=scale1, norm2=blk.norm2, scale2=scale2, **parts)


def _scales(blk: Any, *names: str) -> Fn:
    return joined(*(getattr(blk, name, identity) for name in names))


def _projections(attn: Any) -> Projections | None:
    """Return the weights by head; None where a layer is no plain linear one (LoRA) or a norm spans the heads."""
    from timm.layers import Attention

    if not (is_bare(attn, Attention) and isinstance(attn.norm, nn.Identity)):
        return None
    return by_head(attn.qkv, attn.proj, attn.num_heads, (attn.q_norm, attn.k_norm))


def _qkv(attn: nn.Module, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a: Any = attn
    q, k, v = split_qkv(a.qkv(h), a.num_heads)
    return a.q_norm(q), a.k_norm(k), v


def _out(attn: nn.Module, x: Tensor) -> Tensor:
    a: Any = attn
    return a.proj(a.norm(x.transpose(1, 2).flatten(2)))
