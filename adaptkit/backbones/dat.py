"""Our DAT (:mod:`adaptkit.models`): four stages, windows and deformable attention in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones._maps import as_map, as_tokens, on_nchw
from adaptkit.backbones._timm import split_qkv, timm_source
from adaptkit.backbones._windows import by_cell, padded, partitioned
from adaptkit.core.block import Block
from adaptkit.core.hierarchical import HierarchicalSpec, HierarchicalViT
from adaptkit.core.registry import register_family
from adaptkit.core.tree import unwrapped
from adaptkit.core.view import Source
from adaptkit.mixers.dat import attention_weights
from adaptkit.mixers.window import ShiftedWindowAttention
from adaptkit.ops.grid import map_to_tokens, pad_to_multiple


@register_family("adaptkit.models.dat.DAT")
class Dat(HierarchicalViT):
    """Blocks on maps (B, D, h, w), given and taken as tokens without a copy.

    A block is no module of its own: the authors' names, which their checkpoints have, list norms, attentions and MLPs
    apart. So the stage runs it by its number.
    """

    positions = "bicubic, relative: tables of displacements; in windows they are kept as they are"

    def __init__(self, backbone: Any) -> None:
        count = len(backbone.stages)  # fewer than it was built with where it was pruned
        dims = tuple(info["num_chs"] for info in backbone.feature_info[:count])
        strides = tuple(info["reduction"] for info in backbone.feature_info[:count])
        depths = tuple(len(stage.attns) for stage in backbone.stages)
        channels = int(backbone.patch_proj[0].weight.shape[1])
        super().__init__(backbone, HierarchicalSpec("dat", dims, depths, strides, channels))

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """``backbone.patch_proj``."""
        return as_tokens(self.backbone.patch_proj(image))

    def enter(self, stage: int, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Downsampling, a strided convolution of an even map, and the stem's width in the first stage."""
        backbone: Any = self.backbone
        y = as_map(x, grid)
        y = backbone.down_projs[stage - 1](pad_to_multiple(y, 2)) if stage else y
        return as_tokens(backbone.stages[stage].proj(y))

    def blocks(self, stage: int, grid: tuple[int, int]) -> Sequence[Block]:
        """The stage's blocks, given maps of this grid."""
        backbone: Any = self.backbone
        return [_block(backbone.stages[stage], index, grid) for index in range(self.spec.depths[stage])]

    def norm(self, x: Tensor) -> Tensor:
        """``backbone.cls_norm``."""
        return map_to_tokens(self.backbone.cls_norm(as_map(x, (x.shape[1], 1))))

    def classify(self, x: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """``backbone.forward_head`` where it has classes."""
        return self.backbone.forward_head(as_map(x, grid)) if self.backbone.num_classes > 0 else None

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Patch kernel, first and last norms."""
        backbone: Any = self.backbone
        first, last = backbone.stages[0].layer_norms[0], backbone.stages[-1].layer_norms[-1]
        return {"patch": backbone.patch_proj[0].weight, "first": first.norm.weight, "last": last.norm.weight}

    def source(self) -> Source:
        """From ``pretrained_cfg``."""
        return timm_source(self)

    def sizes(self) -> Sequence[tuple[int, int]]:
        """Any."""
        return [(2 * self.spec.patch_size, 3 * self.spec.patch_size)]

    def reference(self, image: Tensor) -> Tensor:
        """``backbone.forward_features``, its map as tokens."""
        return map_to_tokens(self.backbone.forward_features(image))


def _block(stage: Any, index: int, grid: tuple[int, int]) -> Block:
    parts = {
        "run": partial(stage.block, index),
        "norm1": stage.layer_norms[2 * index],
        "attn": stage.attns[index],
        "scale1": stage.drop_path[index],
        "norm2": stage.layer_norms[2 * index + 1],
        "mlp": stage.mlps[index],
        "scale2": stage.drop_path[index],
    }
    given: dict[str, Any] = {name: partial(on_nchw, f, grid) for name, f in parts.items()}
    block = Block(**given, qkv=_no_qkv, out=_no_qkv)
    if not isinstance(unwrapped(stage.attns[index]), ShiftedWindowAttention):
        return block
    return replace(block, attended=partial(_attended, stage.attns[index], grid))


def _attended(outer: Any, grid: tuple[int, int], h: Tensor) -> tuple[Tensor, Tensor]:
    """Normed tokens (B, N, D) -> attention (B, heads, N, K) in the window of each cell, and its K cells (N, K)."""
    attn: Any = unwrapped(outer)
    cells = torch.arange(grid[0] * grid[1], device=h.device).view(1, *grid, 1)
    cells = partitioned(padded(cells, attn.window, attn.shift, -1), attn.window).squeeze(-1)  # (windows, K)
    windows = partitioned(padded(h.unflatten(1, grid), attn.window, attn.shift), attn.window)
    q, k, _ = split_qkv(attn.proj_qkv(windows), attn.heads)
    weights = attention_weights(q, k, attn.bias(as_map(h, grid), q))
    return by_cell(weights.unflatten(0, (-1, len(cells))), cells)


def _no_qkv(x: Tensor) -> Any:
    raise TypeError(
        "DAT attends inside shifted windows, or to points that it moves itself, so it has no global q, k and v; use an "
        "adapter around the block, and query_keys to see the points"
    )
