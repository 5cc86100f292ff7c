"""Adapter+ (Steitz & Roth, CVPR 2024): a bottleneck after each frozen block, with a learned scale for each channel.

    y = block(x)
    x = y + s * (W_up gelu(W_down y + b_down) + b_up)            W_down (r, D), W_up (D, r), s (D)

The "Post" position, no norm and channel-wise scaling of section 3; all tokens, class and register tokens too. It starts
as the paper does (section 3.3, "Houlsby"): both matrices are drawn with deviation 0.01 and s = 1, so that the output
just attached is close to that of the frozen backbone, not equal to it; ``init="lora"`` has W_up = 0 and is equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.adapters.base import Aux, BlockAdapter
from adaptkit.core.block import Block, Fn
from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.layers import DropPath, check_choice, check_numbers
from adaptkit.core.registry import register_adapter
from adaptkit.core.view import Spec

__all__ = ["AdapterPlus", "AdapterPlusConfig"]

STD = 0.01


@dataclass(frozen=True)
class AdapterPlusConfig:
    """The rank, and the paper's ways to start."""

    rank: int = 8  #: r of the bottleneck; the paper has 1 to 32
    drop_path: float = 0.1  #: probability that the adapter of a block is left out for an image, in training
    init: Literal["houlsby", "lora", "bert"] = "houlsby"  #: deviations 0.01 and 0.01; W_up = 0; 0.02 and 0.02

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choice("init", self.init, ("houlsby", "lora", "bert"))
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} leaves no bottleneck; give at least 1")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path} must be at least 0 and below 1")


class Bottleneck(nn.Module):
    """A(y) = s * up(gelu(down(y)))."""

    def __init__(self, dim: int, config: AdapterPlusConfig) -> None:
        super().__init__()
        self.down = nn.Linear(dim, config.rank)
        self.up = nn.Linear(config.rank, dim)
        self.drop_path = DropPath(config.drop_path)
        self.scale = nn.Parameter(torch.ones(dim))
        std = 2 * STD if config.init == "bert" else STD
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(layer.bias)
        if config.init == "lora":
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(self.up.weight)

    def forward(self, y: Tensor) -> Tensor:
        """(B, P+N, D) -> what is added, (B, P+N, D)."""
        z = self.up(F.gelu(self.down(y.to(self.scale.dtype))))
        return (self.scale * self.drop_path(z)).to(y.dtype)


@register_adapter("adapter-plus", AdapterPlusConfig)
class AdapterPlus(BlockAdapter):
    """Adapter+: a bottleneck of low rank after each block, scaled by channel."""

    hierarchical = True

    def __init__(self, spec: Spec | HierarchicalSpec, config: AdapterPlusConfig) -> None:
        super().__init__(spec, config)
        self.blocks = nn.ModuleList(Bottleneck(dim, config) for dim in spec.widths)

    def wrap(self, block: Block, index: int, aux: Aux) -> Fn:
        """``y + A(y)`` with y = block(x): (B, P+N, D) -> (B, P+N, D)."""
        bottleneck = self.blocks[index]

        def run(x: Tensor) -> Tensor:
            y = block(x)
            return y + bottleneck(y)

        return run
