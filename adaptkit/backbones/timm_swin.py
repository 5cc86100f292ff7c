"""timm's SwinTransformer: four stages of shifted windows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones._maps import on_map
from adaptkit.backbones._timm import block_list, channels, is_checkpointing, split_qkv, timm_source
from adaptkit.backbones._windows import by_cell
from adaptkit.core.block import Block
from adaptkit.core.hierarchical import HierarchicalSpec, HierarchicalViT
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import Source


@register_family("timm.models.swin_transformer.SwinTransformer")
class TimmSwin(HierarchicalViT):
    """Blocks on maps (B, h, w, D), given and taken as tokens.

    Windows and shifts stay those it was built with; on another grid the masks of the shift are made anew, as timm
    does for ``dynamic_img_size=True``.
    """

    positions = "relative in windows, kept as they are"

    def __init__(self, backbone: Any) -> None:
        patch = backbone.patch_embed.patch_size[0]
        dims = tuple(info["num_chs"] for info in backbone.feature_info)
        strides = tuple(patch * 2**i for i in range(len(backbone.layers)))
        depths = tuple(len(layer.blocks) for layer in backbone.layers)
        super().__init__(backbone, HierarchicalSpec("timm-swin", dims, depths, strides, channels(backbone)))

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """timm's PatchEmbed without its fixed-size assertions."""
        embed: Any = self.backbone.patch_embed
        return _tokens(embed.norm(embed.proj(image).permute(0, 2, 3, 1)))

    def enter(self, stage: int, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Patch merging; the identity in the first stage."""
        backbone: Any = self.backbone
        return _tokens(backbone.layers[stage].downsample(x.unflatten(1, grid)))

    def blocks(self, stage: int, grid: tuple[int, int]) -> Sequence[Block]:
        """timm's own blocks, tokens unfolded to this grid."""
        backbone: Any = self.backbone
        return [_block(blk, grid) for blk in block_list(backbone.layers[stage].blocks)]

    def norm(self, x: Tensor) -> Tensor:
        """``backbone.norm``."""
        return self.backbone.norm(x)

    def classify(self, x: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """``backbone.forward_head`` where it has classes."""
        return self.backbone.forward_head(x.unflatten(1, grid)) if self.backbone.num_classes > 0 else None

    def is_checkpointing(self) -> bool:
        """As ``set_grad_checkpointing`` left it, stage by stage."""
        return any(is_checkpointing(stage) for stage in self.backbone.layers)

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        backbone: Any = self.backbone
        first, last = unwrapped(backbone.layers[0].blocks[0]), unwrapped(backbone.layers[-1].blocks[-1])
        return {"patch": backbone.patch_embed.proj.weight, "first": first.norm1.weight, "last": last.norm2.weight}

    def source(self) -> Source:
        """From ``pretrained_cfg``."""
        return timm_source(self)

    def sizes(self) -> Sequence[tuple[int, int]]:
        """The backbone's own."""
        size = self.backbone.patch_embed.img_size
        return [] if size is None else [(size[0], size[1])]

    def reference(self, image: Tensor) -> Tensor:
        """``backbone.forward_features``, its map as tokens."""
        return self.backbone.forward_features(image).flatten(1, 2)

    def accept(self, grid: tuple[int, int]) -> None:
        """Let the blocks of a copy make their masks anew, as a backbone does that is built for any size."""
        for layer in self.backbone.layers:
            for blk in layer.blocks:
                unwrapped(blk).dynamic_mask = True


def _tokens(x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    return x.flatten(1, 2), (x.shape[1], x.shape[2])


def _block(outer: Any, grid: tuple[int, int]) -> Block:
    """``outer``: the block as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    blk: Any = unwrapped(outer)
    native = blk.dynamic_mask or grid == tuple(blk.input_resolution)
    block = Block(
        run=partial(on_map, outer, grid),
        norm1=blk.norm1,
        attn=partial(on_map, partial(_attn, blk), grid),
        scale1=blk.drop_path1,
        norm2=blk.norm2,
        mlp=blk.mlp,
        scale2=blk.drop_path2,
        qkv=_no_qkv,
        out=_no_qkv,
        attended=partial(_attended, blk, grid),
    )
    # The backbone's own forward would take the mask of its own grid.
    return block if native else Block(**{**vars(block), "run": block.equation})


def _attn(blk: Any, x: Tensor) -> Tensor:
    """(B, h, w, D) -> (B, h, w, D): windows, shifted where the block shifts, with the mask of this grid."""
    from timm.models.swin_transformer import window_partition, window_reverse

    (height, width), window = x.shape[1:3], blk.window_size
    shift = tuple(blk.shift_size)
    x = _shifted(blk, x)
    windows = window_partition(x, window).flatten(1, 2)  # (B * windows, cells, D)
    y = blk.attn(windows, mask=blk.get_attn_mask(x)).unflatten(1, window)
    y = window_reverse(y, window, x.shape[1], x.shape[2])[:, :height, :width].contiguous()
    return y.roll(shift, (1, 2)) if any(shift) else y


def _shifted(blk: Any, x: Tensor, value: float = 0.0) -> Tensor:
    """(B, h, w, D) -> (B, h', w', D): shifted as the block does, then padded to whole windows."""
    (height, width), window, shift = x.shape[1:3], blk.window_size, tuple(blk.shift_size)
    x = x.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x
    return F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]), value=value)


def _attended(blk: Any, grid: tuple[int, int], h: Tensor) -> tuple[Tensor, Tensor]:
    """Normed tokens (B, N, D) -> attention (B, heads, N, K) in the window of each cell, and its K cells (N, K).

    Padding is a key in timm's Swin: what it gets is left out.
    """
    from timm.models.swin_transformer import window_partition

    attn: Any = unwrapped(blk.attn)
    x, count = _shifted(blk, h.unflatten(1, grid)), grid[0] * grid[1]
    cells = torch.arange(count, device=h.device).view(1, *grid, 1)
    cells = window_partition(_shifted(blk, cells, -1), blk.window_size).flatten(1)  # (windows, K), -1 is padding
    q, k, _ = split_qkv(attn.qkv(window_partition(x, blk.window_size).flatten(1, 2)), attn.num_heads)
    logits = q @ k.mT * attn.scale + attn._get_rel_pos_bias()
    logits, mask = logits.unflatten(0, (-1, len(cells))), blk.get_attn_mask(x)  # (B, windows, heads, K, K)
    return by_cell((logits if mask is None else logits + mask[:, None]).softmax(-1), cells)


def _no_qkv(x: Tensor) -> Any:
    raise TypeError(
        "Swin attends inside shifted windows, so it has no global q, k and v; use an adapter around the block"
    )
