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
queries. Rotary keys are rotated at the places they moved to; a relative bias of the host is read there too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.adapters.base import BlockAdapter, Trace
from adaptkit.layers import check_choice, parameter_dtype
from adaptkit.mixers.dat import (
    Bias,
    attention_weights,
    check_heads,
    log_cpb,
    log_cpb_bias,
    move,
    offset_net,
    read,
    reference_points,
    table_bias,
    to_cells,
)
from adaptkit.ops.device import pair
from adaptkit.registry import register_adapter
from adaptkit.vit import Block, Fn, Spec

__all__ = ["DATKV", "DATConfig"]


@dataclass(frozen=True)
class DATConfig:
    """What can be chosen; ``None`` for ``groups`` and ``blocks`` is completed from the backbone."""

    groups: int | None = None  #: sets of points; None: 3, or the next smaller number that divides the heads
    kernel_size: int = 5  #: of the offset network
    #: Of the offset network: a grid of h/stride x w/stride keys. With more than 1 mode "replace" starts elsewhere than
    #: the frozen attention, since most keys are gone.
    stride: int = 1
    offset_range: float | None = 2.0  #: s bounds an offset to s/2 key cells (the paper has 2); None: anywhere
    bias: Bias | None = "table"  #: B: a table by displacement, a network of it ("log-cpb"), or none
    bias_grid: int = 14  #: side of the grid the table is made for; on another grid it is resized (bicubic)
    mode: Literal["add", "replace"] = "add"
    convention: Literal["exact"] = "exact"  #: where a cell lies; kept in the file
    blocks: tuple[int, ...] | int | None = None  #: indices, or the last so many; None: all

    def __post_init__(self) -> None:
        check_choice("bias", self.bias, (*get_args(Bias), None))
        check_choice("mode", self.mode, ("add", "replace"))
        check_choice("convention", self.convention, ("exact",))
        if self.offset_range is not None and self.offset_range <= 0:
            raise ValueError(f"offset_range={self.offset_range} must be positive, or None for points that go anywhere")
        for option in ("kernel_size", "stride", "bias_grid"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}={getattr(self, option)} must be positive")

    def resolve(self, spec: Spec) -> DATConfig:
        """Fill in what depends on the backbone. ``ValueError`` where the two do not fit."""
        groups = self.groups or next(g for g in (3, 2, 1) if spec.heads % g == 0)
        check_heads(spec.dim, spec.heads, groups)
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


class Keys(NamedTuple):
    """Queries, and the keys and values they read."""

    q: Tensor  #: (B, heads, P+N, E)
    k: Tensor  #: (B, heads, P+n, E)
    v: Tensor  #: (B, heads, P+n, E)
    bias: Tensor | None  #: broadcast to (B, heads, P+N, P+n)
    points: Tensor  #: (B, g, Hk, Wk, 2) of the n = Hk * Wk keys that are no prefix token


class Deform(nn.Module):
    """What is learned for one block: the offset network, the position bias, and the gate in mode ``add``."""

    def __init__(self, spec: Spec, config: DATConfig) -> None:
        super().__init__()
        groups = config.groups or 1
        add = config.mode == "add"
        self.conv_offset = offset_net(spec.dim // groups, config.kernel_size, config.stride, config.convention)
        self.rpe_table: nn.Parameter | nn.Module | None = None
        if config.bias == "table":
            side = 2 * config.bias_grid - 1
            self.rpe_table = nn.Parameter(torch.zeros(spec.heads, side, side))
            if add:
                nn.init.trunc_normal_(self.rpe_table, std=0.01)
        elif config.bias == "log-cpb":
            self.rpe_table = log_cpb(spec.heads // groups)
            if not add:
                nn.init.zeros_(self.rpe_table[-1].weight)
        self.gamma = nn.Parameter(torch.zeros(spec.dim)) if add else None
        if not add:
            nn.init.zeros_(self.conv_offset[-1].weight)


@register_adapter("dat", DATConfig)
class DATKV(BlockAdapter):
    """DAT-KV: learned places of keys and values in frozen attention.

    ``Features.aux["points.<block>"]`` is (B, groups, Hk, Wk, 2): where the keys were read, as (y, x) in -1..1 over
    the patch grid.
    """

    inside = True

    def __init__(self, spec: Spec, config: DATConfig) -> None:
        super().__init__(spec, config.resolve(spec))
        self.blocks = nn.ModuleDict({str(i): Deform(spec, self.config) for i in self.config.blocks})

    def wrap(self, block: Block, index: int, trace: Trace) -> Fn:
        """(B, P+N, D) -> (B, P+N, D)."""
        return partial(self._run, block, index, trace) if str(index) in self.blocks else block

    def _run(self, block: Block, index: int, trace: Trace, x: Tensor) -> Tensor:
        h = block.norm1(x)
        keys = self.keys(block, index, h)
        trace[f"points.{index}"] = keys.points
        z = F.scaled_dot_product_attention(keys.q, keys.k, keys.v, attn_mask=keys.bias, scale=block.scale)
        gamma, z = self._of(index).gamma, block.out(z)
        if gamma is None:
            x = x + block.scale1(z)
        else:
            x = x + block.scale1(block.attn(h)) + (gamma * z).to(x.dtype)
        return x + block.scale2(block.mlp(block.norm2(x)))

    def weights(self, block: Block, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention (B, heads, P+N, P+n) that block ``index`` has on its moved keys, and their points."""
        keys = self.keys(block, index, block.norm1(x))
        return attention_weights(keys.q, keys.k, keys.bias, block.scale), keys.points

    def keys(self, block: Block, index: int, h: Tensor) -> Keys:
        """Normed tokens (B, P+N, D) -> queries, moved keys and values, and what is added to their logits."""
        if block.grid is None:
            raise ValueError("DAT-KV needs the grid of the patches, which this block does not know; use attach()")
        own, grid, groups = self._of(index), block.grid, self.config.groups
        q, k, v = _unplaced(block, h)
        prefix = h.shape[1] - grid[0] * grid[1]
        points = self._points(own, _to_map(q, prefix, grid, groups))  # (B*g, Hk, Wk, 2)
        places = to_cells(points, grid, "exact").flatten(1, 2).unflatten(0, (-1, groups))  # (B, g, n, 2)
        moved = read(torch.cat([_to_map(t, prefix, grid, groups) for t in (k, v)], dim=1), points, "exact")
        k_moved, v_moved = (_to_heads(t, groups, q.shape[1]) for t in moved.chunk(2, dim=1))
        if block.rotate is not None:
            cells = (reference_points(grid, "exact", points) + 1) * pair(*grid, points) / 2 - 0.5
            q = torch.cat([q[:, :, :prefix], block.rotate(q[:, :, prefix:], cells.flatten(0, 1))], dim=2)
            k_moved = block.rotate(k_moved, places.repeat_interleave(q.shape[1] // groups, dim=1))
        points = points.unflatten(0, (-1, groups))
        bias = self._bias(own, grid, points, prefix)
        if block.bias is not None:
            frozen = _moved_bias(block.bias, prefix, grid, points)
            bias = frozen if bias is None else frozen + bias
        k, v = torch.cat([k[:, :, :prefix], k_moved], dim=2), torch.cat([v[:, :, :prefix], v_moved], dim=2)
        return Keys(q, k, v, None if bias is None else bias.to(q.dtype), points)

    def _of(self, index: int) -> Deform:
        return cast(Deform, self.blocks[str(index)])

    def _points(self, own: Deform, q: Tensor) -> Tensor:
        """Queries of a group (B*g, C, h, w) -> points (B*g, Hk, Wk, 2)."""
        offset = own.conv_offset(q.to(parameter_dtype(own.conv_offset)))
        reference = reference_points((offset.shape[2], offset.shape[3]), "exact", offset)
        return move(offset, reference, self.config.offset_range, "exact")

    def _bias(self, own: Deform, grid: tuple[int, int], points: Tensor, prefix: int) -> Tensor | None:
        """B for pairs of patches, zero where one of the two is a prefix token: (B, heads, P+N, P+n)."""
        if own.rpe_table is None:
            return None
        at = points.flatten(2, 3)
        if isinstance(own.rpe_table, nn.Module):
            bias = log_cpb_bias(own.rpe_table, grid, at, "exact")
        else:
            bias = table_bias(own.rpe_table, grid, at, "exact")
        return F.pad(bias, (prefix, 0, prefix, 0))


def _unplaced(block: Block, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v before any rotation: every row as a prefix token, which has no place."""
    if block.qkv_at is None:
        return block.qkv(h)
    return block.qkv_at(h, torch.full((h.shape[1],), -1, device=h.device))


def _to_map(t: Tensor, prefix: int, grid: tuple[int, int], groups: int) -> Tensor:
    """(B, heads, P+N, E) -> (B*g, heads/g * E, h, w)."""
    t = t[:, :, prefix:].transpose(2, 3).unflatten(1, (groups, -1))  # (B, g, heads/g, E, N)
    return t.flatten(2, 3).flatten(0, 1).unflatten(2, grid)


def _to_heads(t: Tensor, groups: int, heads: int) -> Tensor:
    """(B*g, heads/g * E, n) -> (B, heads, n, E)."""
    t = t.unflatten(0, (-1, groups)).unflatten(2, (heads // groups, -1))
    return t.flatten(1, 2).transpose(2, 3)


def _moved_bias(bias: Tensor, prefix: int, grid: tuple[int, int], points: Tensor) -> Tensor:
    """Read the host's own bias at the moved keys: (., heads, P+N, P+N) -> (B, heads, P+N, P+n).

    For a query it is a map over the keys, and by displacement bilinear reading of the table is the same as of this map.
    """
    batch, groups = points.shape[:2]
    rows = bias.expand(batch, -1, -1, -1)
    maps = rows[..., prefix:].unflatten(1, (groups, -1)).flatten(0, 1)  # (B*g, heads/g, P+N, N)
    moved = read(maps.flatten(1, 2).unflatten(2, grid), points.flatten(0, 1), "exact")
    moved = moved.unflatten(1, maps.shape[1:3]).unflatten(0, (batch, groups)).flatten(1, 2)
    return torch.cat([rows[..., :prefix], moved], dim=-1)
