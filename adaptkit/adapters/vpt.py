"""Visual prompt tuning (Jia et al., ECCV 2022): learned tokens beside those of the image, in a frozen ViT.

    shallow (eq. 4-6)    [x_1, Z_1] = block_1([x_0, P]),    [x_i, Z_i] = block_i([x_{i-1}, Z_{i-1}])
    deep    (eq. 7-8)    [x_i,  _ ] = block_i([x_{i-1}, P_{i-1}])

P has m tokens (m, D), x the class, register and patch tokens. Attention does not know the order of its tokens, so that
the place of the prompts among them is no choice: here they come last, and never leave the blocks. What comes out has
the tokens of the frozen backbone, and pyramids, heads, positions and exports are as without prompts. To the backbone
they are prefix tokens: rotary positions leave them unturned, and a relative bias is 0 for every pair that has one.

In the deep form the outputs of the prompts are dropped before the next block (section 3.2), so only their keys and
values are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.adapters.base import Aux, BlockAdapter
from adaptkit.core.block import Block, Fn
from adaptkit.core.layers import check_numbers
from adaptkit.core.registry import register_adapter
from adaptkit.core.view import Spec

__all__ = ["VPT", "VPTConfig"]

CARRIED = "vpt.prompts"  #: where a block leaves the prompts for the next one


@dataclass(frozen=True)
class VPTConfig:
    """How many prompts, and where."""

    num_tokens: int = 10  #: m prompts; the paper tunes 1 to 200 for each task
    deep: bool = True  #: a set of prompts for each block, or one that flows through all
    dropout: float = 0.0  #: of the prompts, in training

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens={self.num_tokens} is no prompt; give at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")


@register_adapter("vpt", VPTConfig)
class VPT(BlockAdapter):
    """Visual prompt tuning: learned tokens in each block (deep) or before the first one (shallow)."""

    inside = True

    def __init__(self, spec: Spec, config: VPTConfig) -> None:
        super().__init__(spec, config)
        sets = spec.depth if config.deep else 1
        bound = math.sqrt(6 / (3 * spec.patch_size**2 + spec.embed_dim))  # Xavier's, of the patch embedding
        self.prompts = nn.Parameter(torch.empty(sets, config.num_tokens, spec.embed_dim).uniform_(-bound, bound))
        self.dropout = nn.Dropout(config.dropout)

    def wrap(self, block: Block, index: int, aux: Aux) -> Fn:
        """The block with prompts beside its tokens: (B, P+N, D) -> (B, P+N, D)."""
        return partial(self._deep if self.config.deep else self._shallow, block, index, aux)

    def _own(self, index: int, x: Tensor) -> Tensor:
        """The prompts of a block for each image, (B, m, D)."""
        return self.dropout(self.prompts[index].to(x.dtype).expand(x.shape[0], -1, -1))

    def _deep(self, block: Block, index: int, aux: Aux, x: Tensor) -> Tensor:
        return prompted(block, x, self._own(index, x))[0]

    def _shallow(self, block: Block, index: int, aux: Aux, x: Tensor) -> Tensor:
        prompts = self._own(0, x) if index == 0 else aux.pop(CARRIED)
        if index == self.spec.depth - 1:
            return prompted(block, x, prompts)[0]
        x, aux[CARRIED] = prompted(block, x, prompts, goes_on=True)
        return x


def prompted(block: Block, x: Tensor, p: Tensor, goes_on: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens x (B, P+N, D) and prompts p (B, m, D) -> both after the block; p as it is where it does not go on."""
    tokens, prompts = x.shape[1], p.shape[1]
    (q, k, v), (of_prompts, *more) = block.qkv(block.norm1(x)), block.qkv_unplaced(block.norm1(p))
    k, v = (torch.cat(pair, dim=2) for pair in zip((k, v), more))
    if goes_on:
        x, q = torch.cat([x, p], dim=1), torch.cat([q, of_prompts], dim=2)
    bias = block.bias
    if bias is not None:
        bias = F.pad(bias, (0, prompts, 0, prompts if goes_on else 0))
    x = x + block.scale1(block.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=block.scale)))
    x = x + block.scale2(block.mlp(block.norm2(x)))
    return (x[:, :tokens], x[:, tokens:]) if goes_on else (x, p)
