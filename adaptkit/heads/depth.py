"""The depth head: an FPN whose channels vote for depths in a known range."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.layers import Norm, check_numbers
from adaptkit.core.registry import register_head
from adaptkit.core.view import Features, Spec
from adaptkit.heads.fpn import FPN, FPNHeadConfig
from adaptkit.ops.grid import resample_map

__all__ = ["DepthHead", "DepthHeadConfig"]


@dataclass(frozen=True)
class DepthHeadConfig:
    """The range of depths in metres (or what the data have), the number of bins in it, and the FPN's own settings.

    With ``bins=0`` one channel x says the depth in the logarithm: ``min (max / min) ** sigmoid(x)``.
    """

    max_depth: float
    min_depth: float = 1e-3
    bins: int = 256
    channels: int = 128
    dropout: float = 0.0
    norm: Norm = "group"

    def __post_init__(self) -> None:
        check_numbers(self, but=("max_depth", "min_depth"))  # of any unit
        if not 0 < self.min_depth < self.max_depth:
            raise ValueError(
                f"min_depth={self.min_depth} and max_depth={self.max_depth}: give 0 < min_depth < max_depth"
            )
        if self.bins < 0 or self.bins == 1:
            raise ValueError(f"bins={self.bins}: give at least 2, or 0 for one channel without bins")


@register_head("depth", DepthHeadConfig)
class DepthHead(nn.Module):
    """Depth as the mean of evenly spaced bins, weighted by ``relu(logits) + 0.1`` (AdaBins, DINOv2), from an FPN."""

    answers = "depth"  #: what its logits are, for ``model.predict``

    centres: Tensor

    def __init__(self, spec: Spec | HierarchicalSpec, config: DepthHeadConfig, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        fpn = FPNHeadConfig(max(config.bins, 1), config.channels, config.dropout, config.norm)
        self.fpn = FPN(spec, fpn, strides)
        centres = torch.linspace(config.min_depth, config.max_depth, max(config.bins, 1))
        self.register_buffer("centres", centres, persistent=False)

    def forward(self, features: Features) -> Tensor:
        """Features -> depth (B, 1, H, W) at the image's own size, between ``min_depth`` and ``max_depth``."""
        depth = self.depth(self.fpn(features).float())
        return resample_map(depth, self.fpn.strides[0], 1, features.size)

    def depth(self, logits: Tensor) -> Tensor:
        """(B, bins or 1, h, w) -> (B, 1, h, w)."""
        if self.config.bins == 0:
            span = math.log(self.config.max_depth / self.config.min_depth)
            return self.config.min_depth * torch.exp(span * logits.sigmoid())
        votes = logits.relu() + 0.1
        shares = votes / votes.sum(1, keepdim=True)
        return torch.einsum("bkhw,k->bhw", shares, self.centres.float())[:, None]
