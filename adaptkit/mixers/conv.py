"""Convolutions as mixers: depthwise, several kernels at once, and the inverted separable one."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.mixers.base import Mixer

__all__ = ["DepthwiseConv", "MonaConv", "MultiKernelConv", "SepConv"]


def _depthwise(dim: int, kernel: int, bias: bool) -> nn.Conv2d:
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel} has no centre; choose an odd one")
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=bias)


def _depthwise_each(dim: int, kernels: Sequence[int]) -> nn.ModuleList:
    if not kernels:
        raise ValueError("kernels=() leaves nothing to convolve with; give one or several odd sizes")
    return nn.ModuleList(_depthwise(dim, k, bias=True) for k in kernels)


class DepthwiseConv(Mixer):
    """``y = conv(x)``, one kernel per channel (Yu et al. 2022, section 4.3: the ablation that beats pooling)."""

    def __init__(self, dim: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = _depthwise(dim, kernel, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.conv(x)


class MultiKernelConv(Mixer):
    """``y = mean of conv_k(x)`` over several depthwise kernels, as in Mona (Yin et al. 2025)."""

    def __init__(self, dim: int, kernels: Sequence[int] = (3, 5, 7)) -> None:
        super().__init__()
        self.convs = _depthwise_each(dim, kernels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return sum(conv(x) for conv in self.convs) / len(self.convs)


class MonaConv(Mixer):
    """Mona's filters (Yin et al., CVPR 2025, section 3.3): ``z = x + mean of conv_k(x)``, ``y = z + pw(z)``.

    Both sums are its own; in the ``"metaformer"`` adapter, ``residual=False, mlp_ratio=0`` leaves them the only ones.
    """

    def __init__(self, dim: int, kernels: Sequence[int] = (3, 5, 7)) -> None:
        super().__init__()
        self.convs = _depthwise_each(dim, kernels)
        self.projector = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        z = x + sum(conv(x) for conv in self.convs) / len(self.convs)
        return z + self.projector(z)


class SepConv(Mixer):
    """ConvFormer's mixer: ``y = pw2(conv(relu(pw1(x))^2))``, twice as wide inside (Yu et al. 2023, section 3.2).

    Its StarReLU is here without scale and bias, which the linear layers around it have.
    """

    def __init__(self, dim: int, kernel: int = 7, expansion: int = 2) -> None:
        super().__init__()
        self.pwconv1 = nn.Conv2d(dim, expansion * dim, 1, bias=False)
        self.dwconv = _depthwise(expansion * dim, kernel, bias=False)
        self.pwconv2 = nn.Conv2d(expansion * dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.pwconv2(self.dwconv(F.relu(self.pwconv1(x)).square()))
