"""Sums into a large map, in place and part by part.

The map at stride 4 is larger than all others together. What is added to it is made for a part of it at a time, so that
no second map of its size is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit._cpu.linear import linear, row_slices
from adaptkit.ops.grid import resample_lines, resample_map
from adaptkit.seam import twice, without_autocast

__all__ = ["add_resampled", "add_upsampled"]

NUMBERS = 2**20  # of what is added, at a time: it stays in the cache until it is
PIXELS = 8192  # of the large map at a time, for the same reason


def add_upsampled(fine: Tensor, coarse: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``fine += conv_transpose2d(coarse, weight, bias, stride=2)`` for a kernel of 2x2.

    fine: (B, D', 2h, 2w), changed in place; coarse: (B, D, h, w); weight:
    (D, D', 2, 2); bias: (D',).

    Each coarse pixel makes a block of four fine ones by itself: a matrix product, (h*w, D) x (D, 4 D') for an image.
    """
    return _AddUpsampled.apply(fine, coarse, weight, bias)


def add_resampled(fine: Tensor, x: Tensor, stride: int, to_stride: int) -> Tensor:
    """Return ``fine += resample_map(x, stride, to_stride, its size)``: fine (B, D, H, W), changed; x (B, D, h, w)."""
    return _AddResampled.apply(fine, x, stride, to_stride)


def _blocks(fine: Tensor) -> Tensor:
    """(D', 2h, 2w) -> a view (h, w, 2, 2, D'): the four fine pixels of each coarse one."""
    height, width = fine.shape[1:]
    return fine.movedim(0, -1).unflatten(1, (width // 2, 2)).unflatten(0, (height // 2, 2)).transpose(1, 2)


def _rows(coarse: Tensor) -> Tensor:
    """(D, h, w) -> (h*w, D)."""
    return coarse.flatten(1).t()


def _upsampled(coarse: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv_transpose2d(coarse, weight, bias, stride=2)


class _AddUpsampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fine: Tensor, coarse: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.mark_dirty(fine)
        ctx.save_for_backward(coarse, weight, bias)
        kernel, bias = _matrix(weight), bias.repeat(4)  # (4 D', D)
        for out, x in zip(fine, coarse):
            blocks = _blocks(out)
            for s in _lines(coarse):
                blocks[s] += linear(_rows(x[:, s]), kernel, bias).view(blocks[s].shape)
        return fine

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        coarse, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grad, *twice(_upsampled, (coarse, weight, bias), grad)
        kernel = _matrix(weight)
        grad_coarse, grad_kernel = torch.empty_like(coarse), torch.zeros_like(kernel)
        for g, x, grad_x in zip(grad, coarse, grad_coarse):
            blocks = _blocks(g)
            for s in _lines(coarse):
                rows = blocks[s].reshape(-1, len(kernel))  # (n*w, 4 D')
                grad_kernel.addmm_(rows.t(), _rows(x[:, s]))
                grad_x[:, s] = linear(rows, kernel.t()).t().view(x[:, s].shape)
        grad_weight = grad_kernel.view(2, 2, weight.shape[1], weight.shape[0]).permute(3, 2, 0, 1)
        return grad, grad_coarse, grad_weight, grad.sum((0, 2, 3))


class _AddResampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fine: Tensor, x: Tensor, stride: int, to_stride: int) -> Tensor:
        ctx.mark_dirty(fine)
        ctx.save_for_backward(x)
        ctx.strides = stride, to_stride
        height, width = fine.shape[2:]
        step = stride // math.gcd(stride, to_stride)  # a cell of each grid begins there
        step *= max(1, PIXELS // (width * step))
        for image, of_x in zip(fine.split(1), x.split(1)):
            for s in row_slices(height, step):
                image[:, :, s] += resample_lines(of_x, stride, to_stride, s.start, s.stop, width)
        return fine

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            size = (grad.shape[2], grad.shape[3])
            return grad, *twice(resample_map, (x, *ctx.strides, size), grad)[:3]
        grad_x = torch.empty_like(x)
        for s in _channels(grad):
            with torch.enable_grad():  # what is linear has the gradient of any x
                part = x[:, s].detach().requires_grad_()
                made = resample_map(part, ctx.strides[0], ctx.strides[1], (grad.shape[2], grad.shape[3]))
            (grad_x[:, s],) = torch.autograd.grad(made, part, grad[:, s])
        return grad, grad_x, None, None


def _lines(coarse: Tensor) -> Iterator[slice]:
    """Yield slices of the rows of pixels, of which the product is made without new memory."""
    return row_slices(coarse.shape[2], max(1, PIXELS // (4 * coarse.shape[3])))


def _channels(fine: Tensor) -> Iterator[slice]:
    """Yield slices of the channels, of which a map is made without new memory."""
    pixels = fine.shape[0] * fine.shape[2] * fine.shape[3]
    return row_slices(fine.shape[1], max(16, NUMBERS // pixels))


def _matrix(weight: Tensor) -> Tensor:
    """(D, D', 2, 2) -> (4 D', D)."""
    return weight.permute(2, 3, 1, 0).flatten(0, 2)
