"""Blocks that work on a map, (B, h, w, D) or (B, D, h, w), with windows or without, given tokens (B, h*w, D)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from adaptkit.core.block import Fn
from adaptkit.ops.grid import map_to_tokens, tokens_to_map

__all__ = ["as_map", "as_tokens", "no_qkv", "on_map", "on_nchw", "windowed"]


def on_map(f: Fn, grid: tuple[int, int], x: Tensor) -> Tensor:
    """Run what takes and gives a map."""
    return f(x.unflatten(1, grid)).flatten(1, 2)


def on_nchw(f: Fn, grid: tuple[int, int], x: Tensor) -> Tensor:
    """Run what takes and gives a map (B, D, h, w). Nothing is copied: another layout would round differently."""
    return map_to_tokens(f(as_map(x, grid)))


def as_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, h*w, D) -> map (B, D, h, w) of the layout that the tokens had as a map.

    Of a batch of one ``flatten`` forgets how far images lie apart, and a convolution that finds another distance than
    channels-last has takes another kernel.
    """
    return x.unflatten(1, grid).permute(0, 3, 1, 2) if x.is_contiguous() else tokens_to_map(x, grid)


def as_tokens(x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Map (B, D, h, w) -> tokens (B, h*w, D) and their grid."""
    return map_to_tokens(x), (x.shape[-2], x.shape[-1])


def windowed(attn: Callable[[Tensor], Tensor], side: int, x: Tensor) -> Tensor:
    """Attend on a map (B, h, w, D) inside windows of this side, padded with zeros; side 0: on the whole map."""
    if side == 0:
        return attn(x)
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    rows, columns = x.shape[1] // side, x.shape[2] // side
    cells = x.unflatten(1, (rows, side)).unflatten(3, (columns, side))  # (B, rows, side, columns, side, D)
    y = attn(cells.transpose(2, 3).flatten(0, 2))
    y = y.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return y[:, :height, :width].contiguous()


def no_qkv(x: Tensor) -> Any:
    """Raise ``TypeError``: the ``qkv`` and ``out`` of an attention that has none for all tokens at once."""
    raise TypeError(
        "this backbone attends inside padded windows, or with positions that depend on the query: it has no global q, "
        "k, v and bias; use an adapter that leaves the inside of the attention alone"
    )
