"""Rotary positions between the cells of a grid.

On a given grid every rotary angle is an affine function of the place (y, x), counted in cells::

    angle(y, x) = first + y * step[0] + x * step[1]

so that a key that was read between cells can be turned to where it lies. What ``first`` and ``step`` are is the
backbone's own rule; a test compares the angles at whole cells with those that the backbone computes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Rotary", "axial", "rotary_of_timm", "rows_at"]


class Rotary(NamedTuple):
    """Angles of one block on one grid; E/2 of them, for every head or the same for all."""

    first: Tensor  #: (E/2,) or (heads, 1, E/2), at the first cell
    step: Tensor  #: (2, E/2) or (2, heads, 1, E/2), per cell down and to the right
    half: bool  #: whether channel i turns with channel i + E/2, or 2i with 2i + 1

    def turn(self, x: Tensor, places: Tensor) -> Tensor:
        """x (B, heads, n, E) at ``places`` (n, 2) or (B, heads, n, 2), as (y, x) in cells -> rotated, same dtype."""
        y, across = places[..., :1], places[..., 1:]
        angles = self.first + y * self.step[0] + across * self.step[1]  # (..., n, E/2)
        cos, sin = angles.cos(), angles.sin()
        a, b = x.chunk(2, dim=-1) if self.half else (x[..., ::2], x[..., 1::2])
        turned = (a * cos - b * sin, b * cos + a * sin)
        turned = torch.cat(turned, dim=-1) if self.half else torch.stack(turned, dim=-1).flatten(-2)
        return turned.to(x.dtype)


def rows_at(cos: Tensor, sin: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (h*w, E) of the patches at ``places`` (n,) -> those (n, E); 1 and 0 for a prefix token, -1."""
    index = places % (len(cos) + 1)  # the row that is added is place -1
    cos = torch.cat([cos, cos.new_ones(1, cos.shape[-1])]).index_select(0, index)
    return cos, torch.cat([sin, sin.new_zeros(1, sin.shape[-1])]).index_select(0, index)


def axial(
    frequencies: Tensor, origins: tuple[float, float], steps: tuple[float, float], yx: bool, half: bool
) -> Rotary:
    """Half of the angles turn with one axis and half with the other, by the same frequencies (E/4,).

    ``origins`` and ``steps``: the backbone's coordinate of the first cell and from cell to cell, for y and x. ``yx``:
    whether the half that turns with y comes first.
    """
    none = torch.zeros_like(frequencies)
    down, across = (steps[0] * frequencies, none), (none, steps[1] * frequencies)
    first = (origins[0] * frequencies, origins[1] * frequencies)
    if not yx:
        down, across, first = down[::-1], across[::-1], first[::-1]
    return Rotary(torch.cat(first), torch.stack([torch.cat(down), torch.cat(across)]), half)


def rotary_of_timm(rope: Any, grid: tuple[int, int], index: int) -> Rotary:
    """Read the angles of block ``index`` off timm's module; ``TypeError`` for a kind that is not known."""
    kind, yx = type(rope).__name__, rope.grid_indexing == "ij"
    if kind == "RotaryEmbeddingMixed":  # learned directions, no half for an axis
        step = rope.freqs[:, index, :, None]  # (2, heads, 1, E/2)
        return Rotary(torch.zeros_like(step[0]), step if yx else step.flip(0), half=False)
    if kind == "RotaryEmbeddingDinoV3":
        return axial(2 * math.pi / rope.periods, *_centred(rope, grid), yx, rope.rotate_half)
    if kind == "RotaryEmbeddingCat":
        if rope.bands is None:  # timm before it kept the frequencies beside the angles of a fixed grid
            raise TypeError(
                "this version of timm keeps rotary angles of one grid and not their frequencies: upgrade timm, or "
                "build the model with dynamic_img_size=True"
            )
        return axial(rope.bands, *_cat(rope, grid), yx, getattr(rope, "rotate_half", False))
    raise TypeError(f"timm's {kind} has no rule here for places between cells; use an adapter that moves no keys")


def _centred(rope: Any, grid: tuple[int, int]) -> tuple[Any, Any]:
    """Cell i of n lies at 2 (i + 1/2 + offset) / n - 1; n is the axis' own, or the smaller or larger of both."""
    joint = {"min": min(grid), "max": max(grid)}
    sides = [joint.get(rope.normalize_coords, n) for n in grid]
    return [(1 + 2 * rope.grid_offset) / n - 1 for n in sides], [2 / n for n in sides]


def _cat(rope: Any, grid: tuple[int, int]) -> tuple[Any, Any]:
    """Cell i lies at i + offset, or between -1 and 1; on another grid the reference grid is stretched over it."""
    kind = getattr(rope, "grid_type", "pixel" if rope.in_pixels else "index")
    if kind == "centered":
        origins, steps = _centred(rope, grid)
    elif kind == "index":
        origins, steps = [rope.grid_offset] * 2, [1.0] * 2
    else:
        origins, steps = [-1.0] * 2, [2 / max(n - 1, 1) for n in grid]
    if rope.ref_feat_shape is not None and kind != "centered":
        stretch = [reference / n for reference, n in zip(rope.ref_feat_shape, grid)]
        origins, steps = ([v * s for v, s in zip(values, stretch)] for values in (origins, steps))
    return origins, steps
