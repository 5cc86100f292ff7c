"""Rein (Wei et al., CVPR 2024): learned tokens that refine the tokens after each frozen block.

    S  = softmax(f T_i^t / sqrt(D))                                 f (N, D), T_i (m, D), S (N, m)
    d  = S[:, 1:] (T_i[1:] W_t + b_t)                               W_t (D, D)
    f <- f + s * ((d + f) W_f + b_f)                                W_f (D, D), s a scalar
    T_i = A_i B_i                                                   A_i (m, r), B_i (r, D)

f are the tokens after block i but the first prefix token: a class token passes by, registers are refined as patches
are; where a backbone has registers and no class token, the first register passes by. The first of the m tokens takes
part in the softmax and not in the sum: what looks at it gets so much less of the others. W_t and W_f are shared by all
blocks, each block has its own T_i.

It starts as the paper does, with s = 0.001, so that the output just attached is close to that of the frozen backbone,
not equal to it; with ``zero_mlp_delta_f`` W_f = b_f = 0 and s = 1 is no parameter, and it is equal. Parameters are
called as in the authors' files. Not here are the queries that the authors make of all T_i for Mask2Former: they are of
that head alone. The authors decay no T_i; the recipes decay every matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaptkit.adapters.base import Aux, BlockAdapter
from adaptkit.core.block import Block, Fn
from adaptkit.core.layers import check_numbers, parameter_dtype
from adaptkit.core.registry import register_adapter
from adaptkit.core.view import Spec

__all__ = ["Rein", "ReinConfig"]


@dataclass(frozen=True)
class ReinConfig:
    """How many tokens, of which rank, and how it starts."""

    num_tokens: int = 100  #: m of each block, the one that is left out of the sum among them
    rank: int = 16  #: r of T_i = A_i B_i; 0: T_i is a matrix of its own
    scale: float = 0.001  #: s at the start; trained
    zero_mlp_delta_f: bool = False  #: start at the frozen model: W_f = b_f = 0, and s = 1 is not trained

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.num_tokens < 2:
            raise ValueError(
                f"num_tokens={self.num_tokens} leaves none in the sum, which has no first; give at least 2"
            )
        if self.rank < 0:
            raise ValueError(f"rank={self.rank} is no rank; give at least 1, or 0 for tokens of full rank")
        if self.scale == 0 and not self.zero_mlp_delta_f:
            raise ValueError("scale=0 gives no other parameter a gradient; start at zero with zero_mlp_delta_f=True")


@register_adapter("rein", ReinConfig)
class Rein(BlockAdapter):
    """Rein: learned tokens refine the patch tokens after each block; the class token passes by."""

    def __init__(self, spec: Spec, config: ReinConfig) -> None:
        super().__init__(spec, config)
        depth, dim, m, r = spec.depth, spec.embed_dim, config.num_tokens, config.rank
        bound = math.sqrt(6 / (3 * spec.patch_size**2 + (math.sqrt(dim * r) if r else dim)))
        if r:
            self.learnable_tokens_a = nn.Parameter(torch.empty(depth, m, r).uniform_(-bound, bound))
            self.learnable_tokens_b = nn.Parameter(torch.empty(depth, r, dim).uniform_(-bound, bound))
        else:
            self.learnable_tokens = nn.Parameter(torch.empty(depth, m, dim).uniform_(-bound, bound))
        self.mlp_token2feat = nn.Linear(dim, dim)  # torch's start is the authors': Kaiming's, uniform, a = sqrt(5)
        self.mlp_delta_f = nn.Linear(dim, dim)
        self.scale: Tensor | float = 1.0
        if config.zero_mlp_delta_f:
            nn.init.zeros_(self.mlp_delta_f.weight)
            nn.init.zeros_(self.mlp_delta_f.bias)
        else:
            self.scale = nn.Parameter(torch.tensor(config.scale))

    def tokens(self, index: int) -> Tensor:
        """T_i of block ``index``, (m, D)."""
        if not self.config.rank:
            return self.learnable_tokens[index]
        return self.learnable_tokens_a[index] @ self.learnable_tokens_b[index]

    def delta(self, f: Tensor, index: int) -> Tensor:
        """f (B, n, D) after block ``index`` -> what is added, (B, n, D)."""
        t = self.tokens(index)
        own = f.to(parameter_dtype(self))
        s = (own @ t.mT / math.sqrt(self.spec.embed_dim)).softmax(-1)
        d = s[..., 1:] @ self.mlp_token2feat(t[1:])
        return (self.scale * self.mlp_delta_f(d + own)).to(f.dtype)

    def wrap(self, block: Block, index: int, aux: Aux) -> Fn:
        """The block, and what it gives refined: (B, P+N, D) -> (B, P+N, D)."""
        height, width = block.patch_grid()
        patches = height * width

        def run(x: Tensor) -> Tensor:
            y = block(x)
            first, f = y.tensor_split([min(1, y.shape[1] - patches)], dim=1)
            return torch.cat([first, f + self.delta(f, index)], dim=1)

        return run
