"""BatchNorm in eval mode is an affine map per channel: of a convolution's weight and bias, or one pass over a map."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["conv_norm", "norm_map", "norm_twice"]


def norm_map(norm: nn.Module, x: Tensor, mine: bool = False) -> Tensor:
    """``norm(x)``; ``mine``: without gradients x itself may be changed."""
    if not _is_affine(norm):
        return norm(x)
    scale, shift = (t[:, None, None] for t in _scale_and_shift(norm))
    if torch.is_grad_enabled() or not mine:
        return torch.addcmul(shift, x, scale)
    return torch.addcmul(shift, x, scale, out=x)


def norm_twice(norm: nn.Module, x: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """``norm(x)``, and a function that makes it once more, later: in the mode and with the statistics of now."""
    if _is_affine(norm):
        scale, shift = (t[:, None, None] for t in _scale_and_shift(norm))
        return torch.addcmul(shift, x, scale), lambda: torch.addcmul(shift, x, scale)
    y = norm(x)
    if isinstance(norm, nn.BatchNorm2d):  # the running statistics have seen x
        return y, lambda: F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
    return y, lambda: norm(x)


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(conv(x))``. In eval mode BatchNorm goes into the convolution, which has no bias of its own."""
    if not _is_affine(norm) or conv.bias is not None:
        return norm(conv(x))
    scale, shift = _scale_and_shift(norm)
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


def _is_affine(norm: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    return isinstance(norm, nn.BatchNorm2d) and not norm.training and norm.running_mean is not None


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean.clone() * scale  # another forward may move it before the backward
