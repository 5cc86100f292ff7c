r"""Bilinear reading of a map at continuous places.

    out[b, :, i] = sum_{y, x}  t(py - y) t(px - x) X[b, :, y, x],      t(r) = max(0, 1 - |r|),  (py, px) = places[b, i]

Places are counted in cells: the centre of the first cell is 0, of the last one H - 1.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.ops.grid import pair
from adaptkit.seam import constant, is_transformed

__all__ = ["coordinate_dtype", "sample"]


def coordinate_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of coordinates over ``x``: bf16 could not tell neighbouring pixels of a wide map apart."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sample(x: Tensor, places: Tensor, padding: Literal["zeros", "border"] = "zeros") -> Tensor:
    """Read ``x`` (B, C, H, W) at ``places`` (B, n, 2), as (y, x) in cells -> (B, C, n) in the dtype of ``x``.

    ``padding``: beyond the map lie zeros, or its border goes on. The arithmetic is float32, or float64 if ``x`` is.
    At whole coordinates, where bilinear interpolation has a kink, the derivative is the one to the right. A place that
    is not a number reads NaN: `grid_sample` reads a pixel or zeros for it, and with a border its gradient is written
    out of bounds.
    """
    dtype = coordinate_dtype(x)
    plain = torch.compiler.is_exporting() or is_transformed()
    read = _gather if plain else _grid_sample
    missing = places.isnan()
    out = read(x.to(dtype), places.masked_fill(missing, 0).to(dtype), padding)
    unknown = torch.zeros_like(places[:, None, :, 0], dtype=dtype).masked_fill(missing.any(-1)[:, None], torch.nan)
    return (out + unknown).to(x.dtype)


def _grid_sample(x: Tensor, places: Tensor, padding: str) -> Tensor:
    size = pair(x.shape[-2], x.shape[-1], places)
    grid = ((2 * places + 1) / size - 1).flip(-1)  # (y, x) in cells -> (x, y) with -1 and 1 at the outer edges
    return F.grid_sample(x, grid[:, :, None], "bilinear", padding, align_corners=False).squeeze(-1)


def _gather(x: Tensor, places: Tensor, padding: str) -> Tensor:
    """Read the four neighbours one by one: for runtimes without a sampling operator, and in forward mode."""
    last = [n - 1 for n in x.shape[-2:]]
    if padding == "border":
        places = torch.stack([_clamp(p, n) for p, n in zip(places.unbind(-1), last)], dim=-1)
    first = places.floor()
    after = places - first
    out = torch.zeros_like(x[:, :, 0, :1])
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight, index = torch.ones_like(places[..., 0]), torch.zeros_like(places[..., 0])
        for axis, step in enumerate(corner):
            cell = first[..., axis] + step
            inside = (cell >= 0) & (cell <= last[axis])
            weight = weight * (after[..., axis] if step else 1 - after[..., axis]) * inside
            index = index * x.shape[2 + axis] + cell.clamp(0, last[axis])
        rows = index.long()[:, None].expand(-1, x.shape[1], -1)  # (B, C, n)
        out = out + weight[:, None] * x.flatten(2).gather(2, rows)
    return out


def _clamp(x: Tensor, last: int) -> Tensor:
    """``x.clamp(0, last)``; on the border its derivative is zero, as beyond it and as that of `grid_sample`."""
    return torch.where((x > 0) & (x < last), x, constant(x).clamp(0, last))
