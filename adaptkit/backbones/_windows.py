"""Windows of one side on a map (B, h, w, D), shifted or not, as Swin attends in them (Liu et al. 2021, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["by_cell", "padded", "partitioned", "shift_mask", "shifted_windows"]

Attend = Callable[[Tensor, Tensor | None], Tensor]  # windows (n, K, D), mask (windows, K, K) or None -> (n, K, D)


def shifted_windows(attn: Attend, side: int, shift: int, x: Tensor) -> Tensor:
    """(B, h, w, D) -> (B, h, w, D): pad to whole windows, shift, attend in each, and back."""
    height, width = x.shape[1:3]
    x = padded(x, side, shift)
    size = (x.shape[1], x.shape[2])
    y = attn(partitioned(x, side), shift_mask(size, side, shift, x) if shift else None)
    y = y.unflatten(1, (side, side)).unflatten(0, (-1, size[0] // side, size[1] // side))
    y = y.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    y = y.roll((shift, shift), (1, 2)) if shift else y
    return y[:, :height, :width].contiguous()


def padded(x: Tensor, side: int, shift: int, value: float = 0.0) -> Tensor:
    """(B, h, w, D) -> (B, h', w', D): padded to whole windows at the bottom and the right, then shifted."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % side, 0, -x.shape[1] % side), value=value)
    return x.roll((-shift, -shift), (1, 2)) if shift else x


def partitioned(x: Tensor, side: int) -> Tensor:
    """(B, h, w, D) -> (B * windows, side * side, D)."""
    cells = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (B, rows, side, columns, side, D)
    return cells.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def shift_mask(size: tuple[int, int], side: int, shift: int, like: Tensor) -> Tensor:
    """0 where two cells of a window lay together before the shift, else -100: (windows, K, K)."""
    bands = []
    for length in size:  # never wrapped, the last window's own part, and what the shift has wrapped
        i = torch.arange(length, device=like.device)
        bands.append((i >= length - side).long() + (i >= length - shift).long())
    region = partitioned((3 * bands[0][:, None] + bands[1])[None, :, :, None], side).squeeze(-1)  # (windows, K)
    return like.new_zeros(()).masked_fill(region[:, None] != region[:, :, None], -100.0)


def by_cell(weights: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (B, windows, heads, K, K) and the cell at each place (windows, K), -1 for padding, cell by cell.

    Returns (B, heads, N, K), and which cell each key is (N, K). What padding gets is left out of the weights.
    """
    weights = weights.masked_fill((cells < 0)[:, None, None], 0.0).transpose(1, 2).flatten(2, 3)  # (B, heads, ., K)
    where = cells.flatten()
    order = where.argsort()[(where < 0).sum() :]  # the cells row by row, without padding
    keys = cells[:, None].expand(-1, cells.shape[1], -1).flatten(0, 1)
    return weights[:, :, order], keys[order].clamp_min(0)
