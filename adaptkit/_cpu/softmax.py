"""Softmax over a few numbers at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptkit.seam import without_autocast

__all__ = ["grouped_softmax"]


def grouped_softmax(logits: Tensor, groups: int) -> Tensor:
    """(..., groups * n) -> the same, softmax over the n numbers of each group.

    For a few numbers next to each other torch's loop on a CPU is slow: the numbers of a group are put into rows of
    their own, so that all groups are done side by side.
    """
    return _GroupedSoftmax.apply(logits, groups)


def _rows(x: Tensor, groups: int) -> Tensor:
    """(..., groups * n) -> (groups, n, all others)."""
    return x.flatten(0, -2).t().contiguous().unflatten(0, (groups, -1))


class _GroupedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, groups: int) -> Tensor:
        out = _rows(logits, groups).softmax(1).flatten(0, 1).t().contiguous().view(logits.shape)
        ctx.save_for_backward(out)
        ctx.groups = groups
        return out

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        out, g = _rows(ctx.saved_tensors[0], ctx.groups), _rows(grad, ctx.groups)
        back = out * (g - (g * out).sum(1, keepdim=True))
        return back.flatten(0, 1).t().contiguous().view(grad.shape), None
