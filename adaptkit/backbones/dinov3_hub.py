"""The original DINOv3: ``torch.hub.load("facebookresearch/dinov3", ...)``, by the names of its attributes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones._dino_hub import COMMON, DinoHub, dino_hub_block
from adaptkit.backbones._rotary import rows_at
from adaptkit.backbones._timm import split_qkv
from adaptkit.core.block import Block
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped

Angles = tuple[Tensor, Tensor]  #: sines and cosines (h*w, E)


@register_family("dinov3.models.vision_transformer.DinoVisionTransformer", having=(*COMMON, "rope_embed"))
class DINOv3Hub(DinoHub):
    """Rotary positions: each block is given sines and cosines (h*w, E); class and storage tokens are not turned."""

    positions = "rope"

    def __init__(self, backbone: Any) -> None:
        storage = getattr(backbone, "storage_tokens", None)
        super().__init__(backbone, "dinov3-hub", 0 if storage is None else storage.shape[1])

    def prepared(self, image: Tensor) -> Tensor:
        """``backbone.prepare_tokens_with_masks``, which says the grid too."""
        return self.backbone.prepare_tokens_with_masks(image)[0]

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """The backbone's own blocks, given the rotary angles of this grid."""
        rope = self.backbone.rope_embed(H=grid[0], W=grid[1])
        return [_block(blk, rope) for blk in self.layers()]


def _block(outer: Any, rope: Angles) -> Block:
    """``outer``: the block as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    attn: Any = unwrapped(unwrapped(outer).attn)
    parts = dino_hub_block(outer) | {
        "run": partial(_run, outer, rope),
        "attn": partial(unwrapped(outer).attn, rope=rope),
    }
    return Block(qkv=partial(_qkv, attn, rope), qkv_at=partial(_qkv_at, attn, rope), **parts)


def _run(block: Any, rope: Angles, x: Tensor) -> Tensor:
    return block(x, rope)


def _qkv(attn: Any, rope: Angles, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, P+N, D) -> three of (B, heads, P+N, E), the last rows of q and k turned."""
    q, k, v = split_qkv(attn.qkv(h), attn.num_heads)
    return _turned(q, rope), _turned(k, rope), v


def _qkv_at(attn: Any, rope: Angles, h: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the rows at these places."""
    cos, sin = rows_at(rope[1], rope[0], places)
    return _qkv(attn, (sin, cos), h)


def _turned(x: Tensor, rope: Angles) -> Tensor:
    """Turn the last rows of x (B, heads, R, E), as many as there are angles, in the angles' own precision."""
    sin, cos = rope
    still, rows = x.tensor_split([x.shape[2] - len(sin)], dim=2)
    first, second = rows.to(sin.dtype).chunk(2, dim=-1)
    turned = rows.to(sin.dtype) * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([still, turned.to(x.dtype)], dim=2)
