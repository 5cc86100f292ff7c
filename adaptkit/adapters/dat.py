r"""DAT-KV: a frozen block keeps its q, k, v and output; only where its keys and values are read is learned.

The deformable attention of DAT (Xia et al., CVPR 2022, section 3) on the projections of a frozen plain ViT. With
h = norm1(x) and q, k, v = qkv(h) of the block::

    points = reference + offset(q)                                one set per group of heads
    k~, v~ = [prefix, sample(k, points)], [prefix, sample(v, points)]
    z = out(softmax(q k~^T * scale + bias(points) + B(q - points)) v~)

    x = x + scale1(attn(h)) + gamma * z      mode "add", gamma = 0 at the start: the frozen block, bitwise
    x = x + scale1(z)                        mode "replace", offset = 0 and B = 0 at the start: within 1e-5
    x = x + scale2(mlp(norm2(x)))

One zero stands in each path and never two in a row: behind a second one nothing would get a gradient.

Differences to DAT, on purpose. DAT samples the input, a group of channels at a time, and projects that; frozen
projections were never trained on a token whose channels come from different places, so here the heads of a group
read whole tokens. Reading a linear projection is projecting what is read, so k and v are sampled themselves. The
convention is ``exact`` (see :mod:`adaptkit.mixers.dat`): zero offsets read the cells. Prefix tokens stay keys and
queries. Rotary keys are rotated at the places they moved to; a relative bias of the backbone is read there too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.adapters.base import Aux, BlockAdapter
from adaptkit.core.block import Block, Fn
from adaptkit.core.layers import check_choice, check_numbers, parameter_dtype
from adaptkit.core.registry import register_adapter
from adaptkit.core.view import Spec
from adaptkit.mixers.dat import (
    Bias,
    Grid,
    Keys,
    attention_weights,
    check_heads,
    key_side,
    log_cpb,
    log_cpb_bias,
    move,
    offset_net,
    read,
    reference_points,
    table_bias,
    to_cells,
)
from adaptkit.ops.grid import pair

__all__ = ["DATKV", "DATConfig"]

Rotation = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DATConfig:
    """What can be chosen; ``None`` for ``groups`` and ``blocks`` is completed from the backbone."""

    groups: int | None = None  #: sets of points; None: 3, or the next smaller number that divides the heads
    kernel_size: int = 5  #: of the offset network
    #: Of the offset network: a grid of h/stride x w/stride keys. With more than 1 mode "replace" starts elsewhere than
    #: the frozen attention, since most keys are gone.
    stride: int = 1
    #: s bounds an offset to s/2 key cells (the paper has 2); None: anywhere; 0: no offsets, an ablation
    offset_range: float | None = 2.0
    bias: Bias | None = "table"  #: B: a table by displacement, a network of it ("log-cpb"), or none
    bias_grid: int = 14  #: side of the grid the table is made for; on another grid it is resized (bicubic)
    mode: Literal["add", "replace"] = "add"
    convention: Literal["exact"] = "exact"  #: where a cell lies; kept in the file
    blocks: tuple[int, ...] | int | None = None  #: indices, or the last so many; None: all

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choice("bias", self.bias, (*get_args(Bias), None))
        check_choice("mode", self.mode, ("add", "replace"))
        check_choice("convention", self.convention, ("exact",))
        if self.offset_range is not None and self.offset_range < 0:
            raise ValueError(
                f"offset_range={self.offset_range} must be positive, 0 for points that stay, or None for any place"
            )
        if self.offset_range == 0 and self.bias is None and self.mode == "replace":
            raise ValueError(
                "mode='replace' with offset_range=0 and bias=None has nothing to train; give a bias, or mode='add'"
            )
        for option in ("kernel_size", "stride", "bias_grid"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}={getattr(self, option)} must be positive")

    def resolve(self, spec: Spec) -> DATConfig:
        """Fill in what depends on the backbone. ``ValueError`` where the two do not fit."""
        groups = self.groups or next(g for g in (3, 2, 1) if spec.num_heads % g == 0)
        check_heads(spec.embed_dim, spec.num_heads, groups)
        blocks = range(spec.depth) if self.blocks is None else self.blocks
        if isinstance(blocks, int):
            blocks = range(max(0, spec.depth - blocks), spec.depth)
        places = tuple(sorted({b + spec.depth if b < 0 else b for b in blocks}))
        if not places or places[0] < 0 or places[-1] >= spec.depth:
            raise ValueError(
                f"blocks={self.blocks} are not among the {spec.depth} blocks of this backbone; give indices below "
                f"{spec.depth}, a number of last blocks, or None for all"
            )
        return replace(self, groups=groups, blocks=places)


class DATBlock(nn.Module):
    """One frozen block whose keys and values are read at learned places.

    What is learned: the offset network, the position bias, and in mode ``add`` the gate.
    """

    def __init__(self, spec: Spec, config: DATConfig) -> None:
        super().__init__()
        self.groups, self.offset_range = config.groups or 1, config.offset_range
        add = config.mode == "add"
        self.kernel_size, self.stride = config.kernel_size, config.stride
        self.conv_offset: nn.Sequential | None = None
        if config.offset_range != 0:
            channels = spec.embed_dim // self.groups
            self.conv_offset = offset_net(channels, config.kernel_size, config.stride, config.convention)
        self.rpe_table: nn.Parameter | nn.Module | None = None
        if config.bias == "table":
            side = 2 * config.bias_grid - 1
            self.rpe_table = nn.Parameter(torch.zeros(spec.num_heads, side, side))
            if add:
                nn.init.trunc_normal_(self.rpe_table, std=0.01)
        elif config.bias == "log-cpb":
            self.rpe_table = log_cpb(spec.num_heads // self.groups)
            if not add:
                nn.init.zeros_(self.rpe_table[-1].weight)
        self.gamma = nn.Parameter(torch.zeros(spec.embed_dim)) if add else None
        if not add and self.conv_offset is not None:
            nn.init.zeros_(self.conv_offset[-1].weight)

    def forward(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, P+N, D) -> the same shape, and where the keys were read (B, g, Hk, Wk, 2)."""
        h = block.norm1(x)
        q, k, v, bias, points = self.keys(block, h)
        z = block.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=block.scale))
        if self.gamma is None:
            x = x + block.scale1(z)
        else:
            x = x + block.scale1(block.attn(h)) + (self.gamma * z).to(x.dtype)
        return x + block.scale2(block.mlp(block.norm2(x))), points

    def weights(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, P+N, D) -> the attention (B, heads, P+N, P+n) on the moved keys, and their points."""
        q, k, _, bias, points = self.keys(block, block.norm1(x))
        return attention_weights(q, k, bias, block.scale), points

    def keys(self, block: Block, h: Tensor) -> Keys:
        """Normed tokens (B, P+N, D) -> all of them as queries; prefix tokens and n moved patches as keys and values."""
        grid = block.patch_grid()
        prefix = h.shape[1] - grid[0] * grid[1]
        q, k, v = block.qkv_unplaced(h)  # (B, heads, P+N, E), before any rotation
        points = self.points(_to_map(q, prefix, grid, self.groups))  # (B*g, Hk, Wk, 2)
        k_moved, v_moved = self._read(k, v, prefix, grid, points)  # (B, heads, n, E)
        if block.rotate is not None:
            q, k_moved = self._rotate(block.rotate, q, k_moved, prefix, grid, points)
        points = points.unflatten(0, (-1, self.groups))  # (B, g, Hk, Wk, 2)
        bias = self.bias(grid, points, prefix)
        if block.bias is not None:
            frozen = _moved_bias(block.bias, prefix, grid, points)
            bias = frozen if bias is None else frozen + bias
        k, v = torch.cat([k[:, :, :prefix], k_moved], dim=2), torch.cat([v[:, :, :prefix], v_moved], dim=2)
        return Keys(q, k, v, None if bias is None else bias.to(q.dtype), points)

    def points(self, q: Tensor) -> Tensor:
        """Queries of a group (B*g, C, h, w) -> points (B*g, Hk, Wk, 2)."""
        if self.conv_offset is None:
            sides = [key_side(n, self.kernel_size, self.stride) for n in q.shape[-2:]]
            return reference_points((sides[0], sides[1]), "exact", q).expand(len(q), -1, -1, -1)
        offset = self.conv_offset(q.to(parameter_dtype(self.conv_offset)))  # (B*g, 2, Hk, Wk)
        reference = reference_points((offset.shape[2], offset.shape[3]), "exact", offset)
        return move(offset, reference, self.offset_range, "exact")

    def bias(self, grid: Grid, points: Tensor, prefix: int) -> Tensor | None:
        """B for pairs of patches, zero where one of the two is a prefix token: (B, heads, P+N, P+n)."""
        if self.rpe_table is None:
            return None
        at = points.flatten(2, 3)
        if isinstance(self.rpe_table, nn.Module):
            bias = log_cpb_bias(self.rpe_table, grid, at, "exact")
        else:
            bias = table_bias(self.rpe_table, grid, at, "exact")
        return F.pad(bias, (prefix, 0, prefix, 0))

    def _read(self, k: Tensor, v: Tensor, prefix: int, grid: Grid, points: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, P+N, E) at the points (B*g, Hk, Wk, 2) -> two of (B, heads, n, E)."""
        maps = torch.cat([_to_map(t, prefix, grid, self.groups) for t in (k, v)], dim=1)
        k_moved, v_moved = read(maps, points, "exact").chunk(2, dim=1)  # (B*g, heads/g * E, n)
        return _to_heads(k_moved, self.groups, k.shape[1]), _to_heads(v_moved, self.groups, k.shape[1])

    def _rotate(
        self, rotate: Rotation, q: Tensor, k: Tensor, prefix: int, grid: Grid, points: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Turn queries (B, heads, P+N, E) where they stand, and keys (B, heads, n, E) where they moved to."""
        cells = (reference_points(grid, "exact", points) + 1) * pair(*grid, points) / 2 - 0.5  # (h, w, 2)
        places = to_cells(points, grid, "exact").flatten(1, 2).unflatten(0, (-1, self.groups))  # (B, g, n, 2)
        q = torch.cat([q[:, :, :prefix], rotate(q[:, :, prefix:], cells.flatten(0, 1))], dim=2)
        return q, rotate(k, places.repeat_interleave(q.shape[1] // self.groups, dim=1))


@register_adapter("dat", DATConfig)
class DATKV(BlockAdapter):
    """DAT-KV: learned places of keys and values in frozen attention.

    ``Features.aux["points.<block>"]`` is (B, groups, Hk, Wk, 2): where the keys were read, as (y, x) in -1..1 over
    the patch grid.
    """

    inside = True

    def __init__(self, spec: Spec, config: DATConfig) -> None:
        super().__init__(spec, config.resolve(spec))
        self.blocks = nn.ModuleDict({str(i): DATBlock(spec, self.config) for i in self.config.blocks})

    def wrap(self, block: Block, index: int, aux: Aux) -> Fn:
        """(B, P+N, D) -> (B, P+N, D)."""
        if index not in self.config.blocks:
            return block
        deformed = self.blocks[str(index)]

        def run(x: Tensor) -> Tensor:
            x, aux[f"points.{index}"] = deformed(block, x)
            return x

        return run


def _to_map(t: Tensor, prefix: int, grid: Grid, groups: int) -> Tensor:
    """(B, heads, P+N, E) -> (B*g, heads/g * E, h, w)."""
    t = t[:, :, prefix:].transpose(2, 3).unflatten(1, (groups, -1))  # (B, g, heads/g, E, N)
    return t.flatten(2, 3).flatten(0, 1).unflatten(2, grid)


def _to_heads(t: Tensor, groups: int, heads: int) -> Tensor:
    """(B*g, heads/g * E, n) -> (B, heads, n, E)."""
    t = t.unflatten(0, (-1, groups)).unflatten(2, (heads // groups, -1))
    return t.flatten(1, 2).transpose(2, 3)


def _moved_bias(bias: Tensor, prefix: int, grid: Grid, points: Tensor) -> Tensor:
    """Read the backbone's own bias at the moved keys: (., heads, P+N, P+N) -> (B, heads, P+N, P+n).

    For a query it is a map over the keys, and by displacement bilinear reading of the table is the same as of this map.
    """
    batch, groups = points.shape[:2]
    rows = bias.expand(batch, -1, -1, -1)
    maps = rows[..., prefix:].unflatten(1, (groups, -1)).flatten(0, 1)  # (B*g, heads/g, P+N, N)
    moved = read(maps.flatten(1, 2).unflatten(2, grid), points.flatten(0, 1), "exact")
    moved = moved.unflatten(1, maps.shape[1:3]).unflatten(0, (batch, groups)).flatten(1, 2)
    return torch.cat([rows[..., :prefix], moved], dim=-1)
