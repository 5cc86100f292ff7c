r"""Antialiased resampling as two matrix products, for runtimes that have no operator for it.

Resampling is linear and separable. With n cells going to m, scale s = n / m, and width w = max(s, 1), the cell i reads

    y_i = sum_j a_ij x_j / sum_j a_ij,      a_ij = k((j + 1/2 - s (i + 1/2)) / w)

where k is the triangle (bilinear, support 1) or Keys' cubic with a = -1/2 (bicubic, support 2). That is
``torch.nn.functional.interpolate(..., antialias=True)`` without aligned corners, and Pillow's ``resize``. Where the
size is left open in a graph, the two matrices are made in the graph, from ``arange`` and arithmetic alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["AntialiasByMatrices", "resample"]


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min(0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


KERNELS = {"bilinear": _triangle, "bicubic": _cubic}


def _matrix(cells: int, to: Any, mode: str, like: Tensor) -> Tensor:
    """Return the weights (to, cells); ``to`` may be a symbol of the graph."""
    rows = torch.arange(to, device=like.device, dtype=like.dtype)
    columns = torch.arange(cells, device=like.device, dtype=like.dtype)
    scale = cells / torch.full((), 1.0, device=like.device, dtype=like.dtype).mul(to)
    weights = KERNELS[mode]((columns + 0.5 - scale * (rows[:, None] + 0.5)) / scale.clamp_min(1))
    return weights / weights.sum(1, keepdim=True)


def resample(x: Tensor, size: tuple[Any, Any], mode: str) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), as ``interpolate(x, size, mode=mode, antialias=True)``."""
    rows = _matrix(x.shape[-2], size[0], mode, x)
    columns = _matrix(x.shape[-1], size[1], mode, x)
    return rows @ x @ columns.T


class AntialiasByMatrices(TorchFunctionMode):
    """Inside, ``interpolate`` with antialias to a given size is :func:`resample`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.interpolate and kwargs.get("antialias") and len(args) <= 2:
            x = args[0] if args else kwargs["input"]
            size = args[1] if len(args) == 2 else kwargs.get("size")
            mode = kwargs.get("mode")
            if mode in KERNELS and x.ndim == 4 and not kwargs.get("align_corners") and isinstance(size, list | tuple):
                return resample(x, (size[0], size[1]), mode)
        return func(*args, **kwargs)
