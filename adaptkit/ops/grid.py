"""Grids: padding to a multiple, tokens and maps, bilinear resampling that keeps pixels where they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "STRIDES",
    "cell_centres",
    "cells",
    "check_strides",
    "map_to_tokens",
    "pad_to_multiple",
    "pair",
    "pairs",
    "resample_lines",
    "resample_map",
    "tokens_to_map",
]


STRIDES = (4, 8, 16, 32)  #: of the maps of a pyramid, in pixels, finest first, as dense heads expect them


def cells(length: int, side: int) -> int:
    """Return how many cells of ``side`` pixels cover ``length`` pixels."""
    return -(-length // side)


def check_strides(strides: Iterable[int], known: tuple[int, ...]) -> tuple[int, ...]:
    """Return ``strides`` finest first; ``ValueError`` unless they are some of the known ones."""
    asked = tuple(strides)
    if not asked or len(set(asked)) < len(asked) or not set(asked) <= set(known):
        raise ValueError(f"strides={list(asked)} must be some of {', '.join(map(str, known))}, each once")
    return tuple(sorted(asked))


def pair(first: float, second: float, like: Tensor) -> Tensor:
    """Return two numbers as a tensor (2,) like this one.

    They are written on its device: a copy from the host would make a GPU wait.
    """
    return torch.stack([like.new_full((), first), like.new_full((), second)])


def pairs(values: Sequence[tuple[float, float]], like: Tensor) -> Tensor:
    """Return pairs of numbers as a tensor (n, 2) like this one, written as `pair` does it."""
    return torch.stack([like.new_full((), number) for value in values for number in value]).unflatten(0, (-1, 2))


def cell_centres(grid: tuple[int, int], stride: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the centres (h*w, 2) of the cells of a grid in pixels, x then y, row by row."""
    y = (torch.arange(grid[0], device=device, dtype=dtype) + 0.5) * stride
    x = (torch.arange(grid[1], device=device, dtype=dtype) + 0.5) * stride
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) -> (B, C, H', W'), the next multiples, zeros at the bottom and the right."""
    height, width = image.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    return F.pad(image, (0, right, 0, bottom)) if bottom or right else image


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h*w, D) -> (B, D, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def map_to_tokens(x: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, h*w, D)."""
    return x.flatten(2).transpose(1, 2)


def resample_map(x: Tensor, stride: float, to_stride: float, size: tuple[int, int]) -> Tensor:
    """Bilinear resampling from one stride to another, cell centres keeping their place in the image.

    x: (B, C, h, w), one cell every ``stride`` pixels from the top left corner. Returns (B, C, *size), one cell every
    ``to_stride`` pixels from the same corner. Beyond the last cell the border is repeated, so the two grids may
    cover a different number of pixels (an image padded to a multiple of 14 against one padded to 32).
    """
    if stride == to_stride and x.shape[-2:] == size:
        return x
    scale = stride / to_stride
    # `interpolate` gives floor(h * scale) cells; repeat the border until that is enough, then crop.
    missing = [max(0, math.ceil(want / scale) - have) for want, have in zip(size, x.shape[-2:])]
    for axis, more in zip((-2, -1), missing):  # F.pad(mode="replicate") fails behind a compiler: its gradient's strides
        if more:
            last = x.narrow(axis, x.shape[axis] - 1, 1)
            x = torch.cat([x, last.expand(*(more if a - x.ndim == axis else -1 for a in range(x.ndim)))], dim=axis)
    x = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False, recompute_scale_factor=False)
    return x[..., : size[0], : size[1]]


def resample_lines(x: Tensor, stride: int, to_stride: int, start: int, stop: int, width: int) -> Tensor:
    """Rows ``start`` to ``stop`` (left out) of :func:`resample_map`, (B, C, stop - start, width), from what they read.

    ``start`` is a multiple of ``stride / gcd(stride, to_stride)``, where cells of both grids begin.
    """
    shared = math.gcd(stride, to_stride)
    above = min(start, stride // shared)  # a whole number of cells of either grid: their last row is the neighbour
    first = min((start - above) * to_stride // stride, x.shape[2] - 1)  # beyond the last cell it is repeated
    last = cells(stop * to_stride, stride) + 1
    return resample_map(x[:, :, first:last], stride, to_stride, (above + stop - start, width))[:, :, above:]
