"""BatchNorm over a batch and the layer behind it, image by image.

The statistics are of the whole batch (Ioffe & Szegedy 2015), and so are what goes in and what comes out. The normed
map in between is not: it is made for one image at a time, in the forward pass and once more in the backward pass. On a
CPU fresh memory costs several times more than memory that was used before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit._cpu.linear import row_slices
from adaptkit.ops import pool
from adaptkit.seam import twice, without_autocast

__all__ = ["is_supported", "norm_large", "norm_pool", "norm_relu_conv"]

_OF_MAP = (0, 2, 3)  # what a channel is summed over
_POOL = (3, 2, 1)  # kernel, stride, padding
_NUMBERS = 2**20  # of a large map at a time: they stay in the cache from one operation to the next
_CONV = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation; not transposed; one group


def is_supported(norm: nn.Module, x: Tensor) -> bool:
    """Whether ``norm`` is the plain BatchNorm, in training, and ``x`` a map in its dtype."""
    plain = type(norm) is nn.BatchNorm2d and norm.training and x.dtype == norm.weight.dtype
    return plain and norm.running_mean is not None and norm.momentum is not None


def norm_relu_conv(x: Tensor, norm: nn.BatchNorm2d, kernel: Tensor) -> Tensor:
    """``conv2d(relu(norm(x)), kernel, padding=1)``: (B, C, H, W), (C', C, 3, 3) -> (B, C', H, W)."""
    return _NormThen.apply(x, norm.weight, norm.bias, *_statistics(norm, x), kernel, norm.eps)


def norm_pool(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """``max_pool2d(norm(x), 3, stride=2, padding=1)``: (B, C, H, W) -> (B, C, H/2, W/2)."""
    return _NormThen.apply(x, norm.weight, norm.bias, *_statistics(norm, x), None, norm.eps)


def norm_large(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """``norm(x)``, (B, C, H, W), channels-last and in memory of an earlier such map."""
    x = x.contiguous(memory_format=torch.channels_last)
    return _Norm.apply(x, norm.weight, norm.bias, *_statistics(norm, x), norm.eps)


@torch.no_grad()
def _statistics(norm: nn.BatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each channel (C,); the running ones of ``norm`` move towards them."""
    norm.num_batches_tracked += 1
    mean, var = torch.batch_norm_update_stats(x, norm.running_mean, norm.running_var, norm.momentum)
    return mean, (var + norm.eps).rsqrt()


def _per_channel(x: Tensor) -> Tensor:
    return x[:, None, None]


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def _norm(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> Tensor:
    """The text of ``_Norm``: mean and rstd are x's own."""
    return F.batch_norm(x, None, None, gamma, beta, training=True, eps=eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> Tensor:
        scale = gamma * rstd
        shift = beta - mean * scale
        ctx.save_for_backward(x, mean, rstd, scale, gamma, beta)
        ctx.eps = eps
        out = pool.empty_like(x)
        for one, o in zip(x.split(1), out.split(1)):
            torch.addcmul(_per_channel(shift), one, _per_channel(scale), out=o)
        return out

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean, rstd, scale, gamma, beta = ctx.saved_tensors
        if torch.is_grad_enabled():
            return twice(_norm, (x, gamma, beta, mean, rstd, ctx.eps), grad)
        out = pool.empty(x.shape, x.dtype, torch.channels_last)
        pixels, g = (t.movedim(1, 3).flatten(0, 2) for t in (x, grad))  # (B*H*W, C)
        grad_x = out.movedim(1, 3).view(pixels.shape)
        slices = list(row_slices(len(pixels), _NUMBERS // len(mean) + 1))
        summed, along = torch.zeros_like(mean), torch.zeros_like(mean)
        for s in slices:
            summed += g[s].sum(0)
            along += (pixels[s] - mean).mul_(g[s]).sum(0)
        slope, level = _of_statistics(x, mean, rstd, scale, summed, along)
        for s in slices:
            torch.addcmul(level, pixels[s], slope, out=grad_x[s]).addcmul_(g[s], scale)
        return out, rstd * along, summed, None, None, None


def _of_statistics(
    x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, summed: Tensor, along: Tensor
) -> tuple[Tensor, Tensor]:
    """What the gradient of x is besides ``scale * g``: ``slope * x + level``, for mean and variance are x's own.

    With g the gradient of the normed map, ``summed`` the sums of g and ``along`` those of g * (x - mean), it is
    gamma * rstd * (g - mean(g) - xhat * mean(g * xhat)), xhat = (x - mean) * rstd.
    """
    count = x.numel() // x.shape[1]
    slope = -scale * rstd.square() * along / count
    return slope, -scale * summed / count - slope * mean


def _norm_then(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, kernel: Tensor | None, eps: float
) -> Tensor:
    """The text of ``_NormThen``."""
    y = _norm(x, gamma, beta, mean, rstd, eps)
    return F.max_pool2d(y, *_POOL) if kernel is None else F.conv2d(y.relu(), kernel, padding=1)


class _NormThen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, kernel: Tensor | None, eps: float
    ) -> Tensor:
        scale = gamma * rstd
        shift = beta - mean * scale
        pooled, places, y = [], [], torch.empty_like(x[:1])
        out = None if kernel is None else pool.empty((len(x), len(kernel), *x.shape[2:]), x.dtype, _layout(x))
        for i, one in enumerate(x.split(1)):
            torch.addcmul(_per_channel(shift), one, _per_channel(scale), out=y)
            if out is None:
                largest, place = F.max_pool2d(y, *_POOL, return_indices=True)
                pooled.append(largest)
                places.append(place)
            else:
                out[i] = F.conv2d(y.relu_(), kernel, padding=1)[0]
        ctx.save_for_backward(x, gamma, beta, mean, rstd, scale, shift, kernel, *places)
        ctx.eps = eps
        return torch.cat(pooled) if out is None else out

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gamma, beta, mean, rstd, scale, shift, kernel, *places = ctx.saved_tensors
        if torch.is_grad_enabled():
            return twice(_norm_then, (x, gamma, beta, mean, rstd, kernel, ctx.eps), grad)
        grad_x, grad_kernel = pool.empty_like(x), None if kernel is None else torch.zeros_like(kernel)
        y = torch.empty_like(x[:1])
        summed, along = torch.zeros_like(mean), torch.zeros_like(mean)
        for i, (one, g) in enumerate(zip(x.split(1), grad.split(1))):
            if kernel is None:  # the place of a largest value is known: of the map the shape alone is asked for
                g = torch.ops.aten.max_pool2d_with_indices_backward(g, one, [3], [2], [1], [1], False, places[i])
            else:
                torch.addcmul(_per_channel(shift), one, _per_channel(scale), out=y).relu_()
                g, of_kernel, _ = torch.ops.aten.convolution_backward(g, y, kernel, None, *_CONV, [True, True, False])
                grad_kernel += of_kernel
                g = torch.ops.aten.threshold_backward.grad_input(g, y, 0, grad_input=g)
            summed += g.sum(_OF_MAP)
            along += torch.sub(one, _per_channel(mean), out=y).mul_(g).sum(_OF_MAP)
            grad_x[i] = g[0]
        slope, level = _of_statistics(x, mean, rstd, scale, summed, along)
        for g, one in zip(grad_x.split(1), x.split(1)):
            g.mul_(_per_channel(scale)).addcmul_(one, _per_channel(slope)).add_(_per_channel(level))
        return grad_x, rstd * along, summed, None, None, grad_kernel, None
