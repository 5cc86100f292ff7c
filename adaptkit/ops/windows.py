"""Windows of an image: the cells of one or several grids, gathered by the window that they lie in.

An axis of n cells is cut into a windows so that cell i lies in window floor(i * a / n). The windows of all grids then
cover the same part of the image, whatever their resolution, and none is empty as long as a <= n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Windows"]


class Windows(NamedTuple):
    """``index`` and ``valid`` (windows, cells): the cells of each window; ``place`` (N,): where each cell went."""

    index: Tensor
    valid: Tensor
    place: Tensor

    @staticmethod
    def of(grids: Sequence[tuple[int, int]], counts: tuple[int, int], device: torch.device) -> Windows:
        """Cut grids (h, w), their cells one after another, into counts[0] x counts[1] windows."""
        indices, valids, places, first, slot = [], [], [], 0, 0
        for h, w in grids:
            rows, columns = _cut(h, counts[0], device), _cut(w, counts[1], device)
            index = rows.index[:, None, :, None] * w + columns.index[:, None, :]  # (a, b, cells down, cells across)
            valid = rows.valid[:, None, :, None] & columns.valid[:, None, :]
            indices.append(index.flatten(2).flatten(0, 1) + first)
            valids.append(valid.flatten(2).flatten(0, 1))
            window = rows.window[:, None] * counts[1] + columns.window
            inside = rows.slot[:, None] * columns.index.shape[1] + columns.slot
            places.append((window.flatten(), inside.flatten() + slot))
            first, slot = first + h * w, slot + index.shape[2] * index.shape[3]
        place = torch.cat([window * slot + inside for window, inside in places])
        return Windows(torch.cat(indices, dim=1), torch.cat(valids, dim=1), place)

    def gather(self, x: Tensor) -> Tensor:
        """(B, heads, N, E) -> (B, heads, windows, cells, E); a window that is not full repeats a cell."""
        return x[:, :, self.index]

    def scatter(self, x: Tensor) -> Tensor:
        """(B, heads, windows, cells, E) -> (B, heads, N, E)."""
        return x.flatten(2, 3)[:, :, self.place]


class _Axis(NamedTuple):
    index: Tensor  #: (windows, cells) position of each cell on the axis
    valid: Tensor  #: (windows, cells) whether it is one
    window: Tensor  #: (n,) window of each position
    slot: Tensor  #: (n,) cell in that window


def _cut(n: int, windows: int, device: torch.device) -> _Axis:
    position = torch.arange(n, device=device)
    window = position * windows // n
    start = (torch.arange(windows + 1, device=device) * n + windows - 1) // windows  # ceil(i * n / windows)
    index = start[:-1, None] + torch.arange(-(-n // windows), device=device)
    return _Axis(index.clamp(max=n - 1), index < start[1:, None], window, position - start[window])
