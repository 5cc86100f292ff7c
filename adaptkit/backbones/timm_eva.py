"""timm's Eva: EVA-02, DINOv3, Perception Encoder, RoPE-ViT; absolute positions, rotary ones, or both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones._rotary import rotary_of_timm
from adaptkit.backbones._timm import (
    REMEDY,
    add_prefix_and_positions,
    block_list,
    class_name,
    fused_qkv,
    is_named,
    joined,
    layer_scale,
    mlp_layers,
    patchify,
)
from adaptkit.backbones._timm_plain import TimmPlain
from adaptkit.core.block import Block, identity
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped


@register_family("timm.models.eva.Eva")
class TimmEva(TimmPlain):
    """Blocks ``x + gamma * attn(norm(x), rope)``; the rotary angles are computed for the grid at hand."""

    family = "timm-eva"
    positions = "rope, absolute ones bicubic antialias"
    prefix_optional = False  # timm leaves the first P tokens unrotated, whatever they are

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone)
        if backbone.pos_embed is None:
            self.positions = "none" if backbone.rope is None else "rope"
        elif backbone.rope is None:
            self.positions = "bicubic antialias"

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches, prefix, absolute positions where there are any, ``norm_pre``."""
        backbone: Any = self.backbone
        return backbone.norm_pre(add_prefix_and_positions(backbone, patchify(backbone, image), grid))

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """timm's own blocks, each given the rotary angles of this grid."""
        backbone: Any = self.backbone
        layers, angles = block_list(backbone.blocks), rope_of(backbone, grid)
        if angles is None:
            return [eva_block(blk, None) for blk in layers]
        return rotary_eva_blocks(layers, backbone.rope, angles if backbone.rope_mixed else [angles] * len(layers), grid)


def rope_of(backbone: Any, grid: tuple[int, int]) -> Tensor | None:
    """Sines and cosines (h*w, 2*E); (depth, heads, h*w, 2*E) for the mixed kind; None for a backbone without."""
    rope = backbone.rope
    if rope is None:
        return None
    if hasattr(rope, "feat_shape") and not backbone.dynamic_img_size and grid == tuple(backbone.patch_embed.grid_size):
        return rope.get_embed()  # the backbone's own buffer
    if getattr(rope, "_use_cached_embed", False):  # built for one grid, `get_embed` would ignore another
        return rope._build_embed_cat(list(grid), rope.bands)
    return rope.get_embed(shape=list(grid))


def rotary_eva_blocks(layers: Sequence[Any], rope: Any, angles: Iterable[Tensor], grid: tuple[int, int]) -> list[Block]:
    """Blocks of EVA, each with its own of the ``angles`` that ``rope`` makes for this grid."""
    pairs = enumerate(zip(layers, angles))
    return [replace(eva_block(blk, turn), rotate=partial(_turned, rope, grid, i)) for i, (blk, turn) in pairs]


def _turned(rope: Any, grid: tuple[int, int], index: int, x: Tensor, places: Tensor) -> Tensor:
    """Turn rows made without a place to continuous ones; the angles are computed only where this is called."""
    return rotary_of_timm(rope, grid, index).turn(x, places)


def eva_block(outer: Any, rope: Tensor | None) -> Block:
    """``outer``: the block as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    blk: Any = unwrapped(outer)
    if not is_named(blk, "EvaBlock", "EvaBlockPostNorm"):
        raise TypeError(f"timm's {class_name(blk)} is not of the form x + attn(norm(x)), x + mlp(norm(x)); {REMEDY}")
    attn = unwrapped(blk.attn)
    parts = {
        "run": partial(outer, rope=rope),
        "attn": partial(blk.attn, rope=rope),
        "mlp": blk.mlp,
        "mlp_layers": partial(mlp_layers, blk.mlp),
        "qkv": partial(_qkv, attn, rope),
        "qkv_at": None if rope is None else partial(_qkv_at, attn, rope),
        "out": partial(_out, attn),
    }
    if is_named(blk, "EvaBlockPostNorm"):  # x + norm(attn(x)): the norm stands where LayerScale does
        scale1, scale2 = joined(blk.norm1, blk.drop_path1), joined(blk.norm2, blk.drop_path2)
        return Block(norm1=identity, scale1=scale1, norm2=identity, scale2=scale2, **parts)
    scale1 = joined(layer_scale(blk.gamma_1), blk.drop_path1)
    scale2 = joined(layer_scale(blk.gamma_2), blk.drop_path2)
    return Block(norm1=blk.norm1, scale1=scale1, norm2=blk.norm2, scale2=scale2, **parts)


def _qkv_at(attn: Any, rope: Tensor, h: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the rows at these places: the angles of each, zero (sine 0, cosine 1) for a prefix token."""
    half = rope.shape[-1] // 2  # timm lays out sines, then cosines
    still = torch.cat([rope.new_zeros(half), rope.new_ones(half)]).expand(*rope.shape[:-2], 1, -1)
    angles = torch.cat([rope, still], dim=-2)  # the last row is place -1
    return _qkv(attn, angles.index_select(-2, places % angles.shape[-2]), h, prefix=0)


def _qkv(attn: Any, rope: Tensor | None, h: Tensor, prefix: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    if attn.qkv is not None:
        q, k, v = fused_qkv(attn, h)
    else:
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        q, k, v = (p(h).unflatten(2, (-1, attn.head_dim)).transpose(1, 2) for p in projections)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        still = attn.num_prefix_tokens if prefix is None else prefix
        q, k = _rotate(attn, rope, q, still).type_as(v), _rotate(attn, rope, k, still).type_as(v)
    groups = attn.num_heads // k.shape[1]  # grouped-query attention: one k and v for several q
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return q, k, v


def _rotate(attn: Any, rope: Tensor, x: Tensor, still: int) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    prefix, patches = x.tensor_split([still], dim=2)
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=attn.rotate_half)], dim=2)


def _out(attn: Any, x: Tensor) -> Tensor:
    if getattr(attn, "gate", None) is not None:
        raise TypeError(
            "this EVA gates its attention by the block's input, so its output is no function of the heads alone; "
            "use an adapter that leaves the inside of the attention alone"
        )
    return attn.proj(attn.norm(x.transpose(1, 2).flatten(2)))
