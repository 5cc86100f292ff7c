"""Attention as a mixer: every place reads all others, or those of its window, by ``softmax(q k^T / sqrt(E)) v``.

There is no bias on the keys: it would add the same to every logit of a query, and softmax takes that away.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.core.layers import check_positive
from adaptkit.mixers.base import CrossMixer, Layout, Mixer, even_heads
from adaptkit.ops.grid import cells, map_to_tokens, tokens_to_map
from adaptkit.ops.windows import Windows

__all__ = ["GlobalAttention", "GlobalCrossAttention", "WindowAttention", "WindowCrossAttention"]


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  #: q, k, v of (B, heads, N, E) -> (B, heads, N, E)


class _SelfAttention(nn.Module):
    """``proj(attend(q, k, v))`` with q, k, v = qkv(x); ``attend`` decides which tokens attend to which."""

    def __init__(self, dim: int, heads: int | None) -> None:
        super().__init__()
        self.heads = even_heads(dim, 16) if heads is None else heads
        if self.heads < 1 or dim % self.heads:
            raise ValueError(f"heads={self.heads} do not divide the width {dim}; choose a divisor of {dim}")
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # three of (B, heads, N, E)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class GlobalAttention(Mixer):
    """Multi-head attention over the whole map; heads of 16 channels if not given."""

    def __init__(self, dim: int, heads: int | None = None) -> None:
        super().__init__()
        self.attn = _SelfAttention(dim, heads)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y = self.attn(map_to_tokens(x), F.scaled_dot_product_attention)
        return tokens_to_map(y, (x.shape[-2], x.shape[-1]))


class WindowAttention(Mixer):
    """Multi-head attention inside windows of at most ``window`` x ``window`` cells, as even as the grid allows."""

    def __init__(self, dim: int, heads: int | None = None, window: int = 7) -> None:
        super().__init__()
        self.attn, self.window = _SelfAttention(dim, heads), window
        check_positive(self, "window")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        grid = (x.shape[-2], x.shape[-1])
        windows = Windows.of((grid,), _counts(grid, self.window), x.device)
        return tokens_to_map(self.attn(map_to_tokens(x), partial(_attend_in, windows, windows)), grid)


class _CrossAttention(nn.Module):
    """``output_proj(attend(q, k, v))`` of queries and values of D channels, ``width`` channels wide inside."""

    def __init__(self, dim: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_proj = nn.Linear(dim, width)
        self.key_proj = nn.Linear(dim, width, bias=False)
        self.value_proj = nn.Linear(dim, width)
        self.output_proj = nn.Linear(width, dim)

    def forward(self, query: Tensor, feat: Tensor, attend: Attend) -> Tensor:
        """Query (B, Q, D), feat (B, S, D) -> (B, Q, D)."""
        q, k, v = self.query_proj(query), self.key_proj(feat), self.value_proj(feat)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, Q or S, E)
        return self.output_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class GlobalCrossAttention(CrossMixer):
    """Every query reads every cell of every level: the first row of ViT-Adapter's table of attentions."""

    def __init__(self, dim: int, width: int, heads: int) -> None:
        super().__init__()
        self.attn = _CrossAttention(dim, width, heads)

    def forward(self, query: Tensor, feat: Tensor, layout: Layout) -> Tensor:
        """Query (B, Q, D), feat (B, S, D) -> (B, Q, D)."""
        return self.attn(query, feat, F.scaled_dot_product_attention)


class WindowCrossAttention(CrossMixer):
    """Every query reads the cells, of every level, that share its window of the image.

    The windows cover at most ``window`` x ``window`` cells of the side that has one grid: the ViT's tokens in
    ViT-Adapter, as queries of the injector and as values of the extractor.
    """

    def __init__(self, dim: int, width: int, heads: int, window: int = 7) -> None:
        super().__init__()
        self.attn, self.window = _CrossAttention(dim, width, heads), window
        check_positive(self, "window")

    def forward(self, query: Tensor, feat: Tensor, layout: Layout) -> Tensor:
        """Query (B, Q, D), feat (B, S, D) -> (B, Q, D)."""
        grids = (*layout.queries, *layout.values)
        base = layout.queries[0] if len(layout.queries) == 1 else layout.values[0]
        rows, columns = _counts(base, self.window)
        counts = (min(rows, *(h for h, _ in grids)), min(columns, *(w for _, w in grids)))
        ours, theirs = (Windows.of(g, counts, query.device) for g in (layout.queries, layout.values))
        return self.attn(query, feat, partial(_attend_in, ours, theirs))


def _counts(grid: tuple[int, int], window: int) -> tuple[int, int]:
    """Return how many windows of ``window`` cells cover a grid, down and across."""
    return cells(grid[0], window), cells(grid[1], window)


def _attend_in(ours: Windows, theirs: Windows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, heads, Q, E), two of (B, heads, S, E) -> (B, heads, Q, E), window by window."""
    heads = q.shape[1]
    mask = torch.zeros_like(theirs.valid, dtype=q.dtype).masked_fill(~theirs.valid, float("-inf"))[:, None]
    # Windows go with the heads: four dimensions are what runtimes other than torch know.
    q, k, v = (part.flatten(1, 2) for part in (ours.gather(q), theirs.gather(k), theirs.gather(v)))
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(heads, 1, 1))  # (B, heads*windows, cells, E)
    return ours.scatter(x.unflatten(1, (heads, -1)))
