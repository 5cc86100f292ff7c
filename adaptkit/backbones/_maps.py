"""Blocks that work on a map (B, h, w, D), with windows or without, given and taken as tokens (B, h*w, D)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from adaptkit.core.view import Fn

__all__ = ["no_qkv", "on_map", "windowed"]


def on_map(f: Fn, grid: tuple[int, int], x: Tensor) -> Tensor:
    """Run what takes and gives a map."""
    return f(x.unflatten(1, grid)).flatten(1, 2)


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
