"""BatchNorm in eval mode is an affine map per channel: of a convolution's weight and bias, or one pass over a map."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["conv_norm", "norm_again", "norm_map"]


def norm_map(norm: nn.Module, x: Tensor, mine: bool = False) -> Tensor:
    """``norm(x)``; ``mine``: without gradients x itself may be changed."""
    if not _is_affine(norm):
        return norm(x)
    scale, shift = (t[:, None, None] for t in _scale_and_shift(norm))
    if torch.is_grad_enabled() or not mine:
        return torch.addcmul(shift, x, scale)
    return torch.addcmul(shift, x, scale, out=x)


def norm_again(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)`` once more: the running statistics have seen x."""
    if isinstance(norm, nn.BatchNorm2d) and norm.training:
        return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
    return norm_map(norm, x)


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
    return scale, norm.bias - norm.running_mean * scale
