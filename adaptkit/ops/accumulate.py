"""A sum into a large map, in place and image by image.

The map at stride 4 is larger than all others together. What is added to it is made for one image at a time, so that
no second map of its size is ever held, forward or backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["add_upsampled"]


def add_upsampled(fine: Tensor, coarse: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``fine += conv_transpose2d(coarse, weight, bias, stride=2)`` for a kernel of 2x2.

    fine: (B, D', 2h, 2w), changed in place, in whose dtype all is computed; coarse: (B, D, h, w); weight:
    (D, D', 2, 2); bias: (D',).

    Each coarse pixel makes a block of four fine ones by itself: one matrix product, (h*w, D) x (D, 4 D') per image.
    """
    if torch.compiler.is_compiling():
        return fine + F.conv_transpose2d(coarse, weight, bias, stride=2)
    return _AddUpsampled.apply(fine, *(t.to(fine.dtype) for t in (coarse, weight, bias)))


def _blocks(fine: Tensor) -> Tensor:
    """(D', 2h, 2w) -> a view (h, w, 2, 2, D'): the four fine pixels of each coarse one."""
    height, width = fine.shape[1:]
    return fine.movedim(0, -1).unflatten(1, (width // 2, 2)).unflatten(0, (height // 2, 2)).transpose(1, 2)


def _rows(coarse: Tensor) -> Tensor:
    """(D, h, w) -> (h*w, D)."""
    return coarse.flatten(1).t()


class _AddUpsampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fine: Tensor, coarse: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.mark_dirty(fine)
        ctx.save_for_backward(coarse, weight)
        kernel, bias = _matrix(weight), bias.repeat(4)
        for out, x in zip(fine, coarse):
            blocks = _blocks(out)
            blocks += F.linear(_rows(x), kernel, bias).view(blocks.shape)
        return fine

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        coarse, weight = ctx.saved_tensors
        kernel = _matrix(weight)
        grad_coarse, grad_kernel = torch.empty_like(coarse), torch.zeros_like(kernel)
        for g, x, grad_x in zip(grad, coarse, grad_coarse):
            rows = _blocks(g).reshape(-1, len(kernel))  # (h*w, 4 D')
            grad_kernel.addmm_(rows.t(), _rows(x))
            grad_x.copy_((rows @ kernel).t().view_as(grad_x))
        grad_weight = grad_kernel.view(2, 2, weight.shape[1], weight.shape[0]).permute(3, 2, 0, 1)
        return grad, grad_coarse, grad_weight, grad.sum((0, 2, 3))


def _matrix(weight: Tensor) -> Tensor:
    """(D, D', 2, 2) -> (4 D', D)."""
    return weight.permute(2, 3, 1, 0).flatten(0, 2)
