"""DAT's deformable attention (Xia et al. 2022) among the mixers: in its self form, and between grids.

Its premise is that queries may share their keys: one set of points, moved by what the queries hold, read by all of
them with ordinary attention. Against ``"msda"``, where each query has points of its own, it is a test of that premise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.core.layers import LayerNorm2d
from adaptkit.mixers.base import CrossMixer, Layout
from adaptkit.mixers.dat import DeformableAttention, attention_weights
from adaptkit.ops import ms_deform_attn
from adaptkit.ops.grid import cells, map_to_tokens, pair, tokens_to_map

__all__ = ["DeformableCrossAttention", "dat"]

SIDE = 14  # points per side of a grid, at most: as many as DAT's third stage has
KERNEL = 5  # of the offset network
FACTOR = 2.0  # s: an offset is at most s/2 points of the grid (section 3.2)


def dat(dim: int, **options: Any) -> DeformableAttention:
    """Build the self form for maps of any size: cells read exactly, positions by a network instead of a table.

    The bias of the keys stays at its start: softmax takes away what it adds, so it would never learn.
    """
    mixer = DeformableAttention(dim, **{"convention": "exact", "bias": "log-cpb", **options})
    mixer.proj_k.bias.requires_grad_(False)
    return mixer


class DeformableCrossAttention(CrossMixer):
    """The queries of one grid share points, and read every level there (ours: DAT has no cross form).

    ::

        points = reference + s/2 tanh(offset(q)) / points per side
        y = softmax(q k^T / sqrt(E)) v,      k, v from the levels, read at the points
    """

    def __init__(self, dim: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_proj = nn.Linear(dim, width)
        self.key_proj = nn.Linear(dim, width, bias=False)  # softmax takes a bias away
        self.value_proj = nn.Linear(dim, width)
        self.output_proj = nn.Linear(width, dim)
        self.offset_conv = nn.Conv2d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        self.offset_norm = LayerNorm2d(width)
        self.offset_proj = nn.Conv2d(width, 2, 1, bias=False)

    def forward(self, query: Tensor, feat: Tensor, layout: Layout) -> Tensor:
        """Query (B, Q, D), feat (B, S, D) -> (B, Q, D)."""
        sizes = [h * w for h, w in layout.queries]
        parts = zip(self.query_proj(query).split(sizes, dim=1), layout.points.split(sizes), layout.queries)
        return self.output_proj(torch.cat([self._attend(q, p, grid, feat, layout) for q, p, grid in parts], dim=1))

    def _attend(self, q: Tensor, places: Tensor, grid: tuple[int, int], feat: Tensor, layout: Layout) -> Tensor:
        """Q (B, h*w, width) of one grid, at ``places`` (h*w, 2) -> (B, h*w, width)."""
        keys = _read(feat, self._points(tokens_to_map(q, grid), places), layout.values)  # (B, L * n, D)
        q, k, v = (self._split(x) for x in (q, self.key_proj(keys), self.value_proj(keys)))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def places(self, query: Tensor, feat: Tensor, layout: Layout) -> list[tuple[Tensor, Tensor]]:
        """Query (B, Q, D), feat (B, S, D) -> for each grid of queries the points that they share, as (x, y) in 0..1
        (B, n, 2), and their attention (B, heads, h*w, L, n), summing to 1 over L and n."""
        found, sizes = [], [h * w for h, w in layout.queries]
        for q, at, grid in zip(self.query_proj(query).split(sizes, dim=1), layout.points.split(sizes), layout.queries):
            points = self._points(tokens_to_map(q, grid), at)
            keys = self._split(self.key_proj(_read(feat, points, layout.values)))
            weights = attention_weights(self._split(q), keys, None)
            found.append((points, weights.unflatten(3, (len(layout.values), -1))))
        return found

    def _points(self, q: Tensor, places: Tensor) -> Tensor:
        """Q (B, width, h, w) -> where the keys are read (B, n, 2), as (x, y) over the extent of the levels."""
        stride = cells(max(q.shape[-2:]), SIDE)
        offset = self.offset_conv(q)[:, :, ::stride, ::stride]  # the convolution with this stride
        offset = self.offset_proj(F.gelu(self.offset_norm(offset))).to(places.dtype)  # (B, 2, h', w')
        step = FACTOR / 2 / pair(offset.shape[-1], offset.shape[-2], offset)
        reference = self.reference(places, (q.shape[-2], q.shape[-1]))
        return reference + map_to_tokens(offset.tanh() * step.view(1, 2, 1, 1))

    @staticmethod
    def reference(places: Tensor, grid: tuple[int, int]) -> Tensor:
        """Places (h*w, 2) of the queries of a grid -> where the points stand before they move (1, n, 2)."""
        stride = cells(max(grid), SIDE)
        reference = tokens_to_map(places[None], grid)
        if stride > 1:  # a point stands at the mean of the cells that it is for
            reference = F.avg_pool2d(reference, stride, ceil_mode=True)
        return map_to_tokens(reference)

    def _split(self, x: Tensor) -> Tensor:
        """(B, n, width) -> (B, heads, n, E)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _read(feat: Tensor, points: Tensor, levels: tuple[tuple[int, int], ...]) -> Tensor:
    """Feat (B, S, D) at points (B, n, 2) of each of L levels -> (B, L * n, D)."""
    one = points.new_ones(1, 1, 1, 1, 1)
    places = points[:, :, None, None, None, :]
    parts = zip(feat.split([h * w for h, w in levels], dim=1), levels)
    return torch.cat([ms_deform_attn(x[:, :, None], [grid], places, one) for x, grid in parts], dim=1)
