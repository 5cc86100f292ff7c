"""timm's Beit: BEiT and BEiT v2, with a relative position bias per block or one for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones._timm import (
    add_prefix_and_positions,
    block_list,
    fused_qkv,
    joined,
    layer_scale,
    merge_heads,
    mlp_layers,
    patchify,
)
from adaptkit.backbones._timm_plain import TimmPlain
from adaptkit.core.block import Block, identity
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped


@register_family("timm.models.beit.Beit")
class TimmBeit(TimmPlain):
    """Blocks ``x + gamma * attn(norm(x))`` with a bias on the logits by where two patches lie to each other.

    timm fixes the grid when the model is built. At another one the view resizes the bias tables as
    ``set_input_size`` does, but leaves the backbone as it is. timm's rule is slow and is paid in every forward: to stay
    at one other size, call ``set_input_size`` on the model before it is attached.
    """

    family = "timm-beit"
    positions = "relative bias, resized as timm's set_window_size; absolute ones bicubic antialias"
    prefix_optional = False  # the bias has a row for the class token
    rebuilds = True

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches, class token, absolute positions where there are any."""
        return add_prefix_and_positions(self.backbone, patchify(self.backbone, image), grid)

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """timm's own blocks; at another grid their own parts, with the resized bias."""
        backbone: Any = self.backbone
        index = _other_index(backbone, grid)
        shared = None if backbone.rel_pos_bias is None else _bias(backbone.rel_pos_bias, grid, index)
        return [_block(blk, shared, grid, index) for blk in block_list(backbone.blocks)]

    def reference(self, image: Tensor) -> Tensor:
        """``backbone.forward_features`` of a copy, whose stand-ins for blocks look nothing up in the large tables."""
        backbone: Any = self.backbone
        for blk in backbone.blocks:
            blk.attn.window_size = None
        return backbone.forward_features(image)

    def accept(self, grid: tuple[int, int]) -> None:
        """Give the bias tables of a copy the shape of this grid; their values do not matter there."""
        backbone: Any = self.backbone
        backbone.patch_embed.grid_size = grid
        for holder in (backbone.rel_pos_bias, *(unwrapped(unwrapped(blk).attn) for blk in backbone.blocks)):
            if holder is not None and holder.window_size is not None:
                _take(holder, grid)


def _other_index(backbone: Any, grid: tuple[int, int]) -> Tensor | None:
    """Which row of the table a pair of tokens reads, (1+h*w, 1+h*w); None on the backbone's own grid."""
    from timm.models.beit import gen_relative_position_index

    if grid == tuple(backbone.patch_embed.grid_size):
        return None
    return gen_relative_position_index(grid, device=backbone.cls_token.device)


def _take(holder: Any, grid: tuple[int, int]) -> None:
    from timm.models.beit import gen_relative_position_index

    table = holder.relative_position_bias_table
    rows = _distances(grid)
    values = torch.linspace(-1, 1, rows * table.shape[1], device=table.device).view(rows, -1).to(table)
    holder.window_size, holder.window_area = grid, grid[0] * grid[1]
    holder.relative_position_bias_table = nn.Parameter(values, requires_grad=False)
    holder.relative_position_index = gen_relative_position_index(grid, device=table.device)


def _distances(grid: tuple[int, int]) -> int:
    """Rows of a table: how two patches may lie, and class to patch, patch to class, class to class."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def _bias(holder: Any, grid: tuple[int, int], index: Tensor | None) -> Tensor:
    """Look the bias up, (heads, 1+h*w, 1+h*w), in the table of an attention or of the whole model."""
    from timm.layers import resize_rel_pos_bias_table

    table = holder.relative_position_bias_table
    if index is None:
        index = holder.relative_position_index
    else:
        shape = (_distances(grid), table.shape[1])
        table = resize_rel_pos_bias_table(table, grid, shape, old_window_size=holder.window_size)
    return table.t().contiguous()[:, index]


def _block(outer: Any, shared: Tensor | None, grid: tuple[int, int], index: Tensor | None) -> Block:
    """``outer``: the block as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    blk: Any = unwrapped(outer)
    attn, bias = unwrapped(blk.attn), shared
    if attn.window_size is not None:
        bias = _bias(attn, grid, index)
        bias = bias if shared is None else bias + shared
    bias = None if bias is None else bias[None]  # four dimensions as timm's own: the CPU picks its kernel by that
    block = Block(
        run=partial(outer, shared_rel_pos_bias=shared),
        norm1=blk.norm1,
        attn=partial(blk.attn, shared_rel_pos_bias=shared),
        scale1=joined(layer_scale(blk.gamma_1), blk.drop_path1),
        norm2=blk.norm2,
        mlp=blk.mlp,
        mlp_layers=partial(mlp_layers, blk.mlp),
        scale2=joined(layer_scale(blk.gamma_2), blk.drop_path2),
        qkv=partial(fused_qkv, attn),
        out=partial(merge_heads, attn.proj),
        bias=bias,
    )
    if index is None or attn.window_size is None:
        return block
    block = replace(block, run=identity, attn=partial(_attention, attn, bias))
    return replace(block, run=block.equation)


def _attention(attn: Any, bias: Tensor, h: Tensor) -> Tensor:
    return merge_heads(attn.proj, F.scaled_dot_product_attention(*fused_qkv(attn, h), attn_mask=bias))
