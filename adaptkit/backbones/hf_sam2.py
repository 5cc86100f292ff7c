"""transformers' Sam2HieraDetModel, the image encoder of SAM 2: four stages, windows, queries pooled between stages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones._hf import tower
from adaptkit.backbones._hf_hierarchical import HfHierarchical, depths_but_entries
from adaptkit.backbones._maps import no_qkv, on_map, windowed
from adaptkit.core.block import Block, identity
from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import View
from adaptkit.ops.grid import pad_to_multiple


@register_family("transformers.models.sam2.modeling_sam2.Sam2HieraDetModel")
class HfSam2(HfHierarchical):
    """Blocks on maps (B, h, w, D). The first block of a later stage pools its queries: it is how the stage is entered.

    The backbone takes images whose sides are multiples of the first window, in pixels, and of the last stride; the view
    pads others with zeros. Tokens are what the last block gives: the neck is left to the model around.
    """

    positions = "bicubic, the window's ones repeated"

    def __init__(self, backbone: Any) -> None:
        config: Any = backbone.config
        counts, widths = tuple(config.blocks_per_stage), tuple(config.embed_dim_per_stage)
        starts = [sum(counts[:stage]) for stage in range(len(counts))]
        pooled = tuple(unwrapped(backbone.blocks[start]).query_stride is not None for start in starts)
        depths = depths_but_entries(counts, pooled, type(backbone).__name__)
        if any(widths[i] != widths[i - 1] and not pooled[i] for i in range(1, len(widths))):
            raise TypeError(
                f"a {type(backbone).__name__} that changes its width without pooling has a block that is not of the "
                "form x + attn(norm(x)); use one whose query pooling stages are those that change the width"
            )
        stride, strides = config.patch_stride[0], []
        for into in pooled:
            stride *= config.query_stride[0] if into else 1
            strides.append(stride)
        kernel = backbone.patch_embed.projection.weight
        super().__init__(backbone, HierarchicalSpec("hf-sam2", widths, depths, tuple(strides), kernel.shape[1]))
        self.starts, self.pooled = starts, pooled

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patches and positions: a small map resized, and one window's worth repeated."""
        body: Any = self.body
        x = body.patch_embed(pad_to_multiple(image, self.spec.strides[-1]))
        grid, window = (x.shape[1], x.shape[2]), body.pos_embed_window
        repeats = [-(-cells // side) for cells, side in zip(grid, window.shape[2:])]
        tiled = window.tile(1, 1, *repeats)[..., : grid[0], : grid[1]]
        x = x + (F.interpolate(body.pos_embed, size=grid, mode="bicubic") + tiled).permute(0, 2, 3, 1)
        return x.flatten(1, 2), grid

    def enter(self, stage: int, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """The block that pools; the identity in a stage without one."""
        if not self.pooled[stage]:
            return x, grid
        x = self.body.blocks[self.starts[stage]](x.unflatten(1, grid))
        return x.flatten(1, 2), (x.shape[1], x.shape[2])

    def blocks(self, stage: int, grid: tuple[int, int]) -> Sequence[Block]:
        """The other blocks of the stage, tokens unfolded to this grid."""
        first = self.starts[stage] + self.pooled[stage]
        return [_block(blk, grid) for blk in self.body.blocks[first : first + self.spec.depths[stage]]]

    def norm(self, x: Tensor) -> Tensor:
        """The identity."""
        return x

    def reference(self, image: Tensor) -> Tensor:
        """``last_hidden_state``, its map as tokens."""
        self._forget_hooks()
        return self.body(image).last_hidden_state.flatten(1, 2)

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        blocks, patch = self.body.blocks, self.body.patch_embed.projection.weight
        first, last = unwrapped(blocks[0]), unwrapped(blocks[-1])
        return {"patch": patch, "first": first.layer_norm1.weight, "last": last.layer_norm2.weight}


def _block(outer: Any, grid: tuple[int, int]) -> Block:
    """``outer``: the block as it runs, maybe compiled or wrapped; its parts are those of what is inside."""
    blk: Any = unwrapped(outer)
    return Block(
        run=partial(on_map, outer, grid),
        norm1=blk.layer_norm1,
        attn=partial(on_map, partial(windowed, blk.attn, blk.window_size), grid),
        scale1=identity,
        norm2=blk.layer_norm2,
        mlp=blk.mlp,
        scale2=identity,
        qkv=no_qkv,
        out=no_qkv,
    )


@register_family("transformers.models.sam2.modeling_sam2.Sam2VisionModel")  # type: ignore[type-var]
def sam2_vision_model(model: Any) -> View:
    """See the backbone inside; the neck stays beside it, unused. ``TypeError`` where it is of another kind."""
    if type(model.backbone).__name__ != "Sam2HieraDetModel":
        raise TypeError(
            f"its backbone is a {type(model.backbone).__name__}: hand over `model.backbone`, if that is seen"
        )
    return tower(HfSam2(model.backbone), model)
