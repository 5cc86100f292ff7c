"""timm's parallel blocks, in the names of a Block.

Several attentions, then several FFNs, each with a norm of its own (Touvron et al. 2022, "Three things everyone should
know about vision transformers", section 3)::

    x = x + sum_i scale_i(attn_i(norm_i(x)))
    x = x + sum_i scale_i(mlp_i(norm_i(x)))

or attention and FFN side by side from one norm (Dehghani et al. 2023, "Scaling vision transformers to 22 billion
parameters", section 2)::

    x = x + scale(attn(norm(x)) + mlp(norm(x)))

In both the attention does not come apart into one ``qkv`` and ``out``: adapters that step inside it are refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones._timm import is_named
from adaptkit.core.block import Block, identity

__all__ = ["attentions", "first_norm", "is_parallel", "parallel_block"]

_THINGS = "ParallelThingsBlock"
_SCALING = ("ParallelScalingBlock", "DiffParallelScalingBlock")


def is_parallel(blk: Any) -> bool:
    """Whether a block is one of these."""
    return is_named(blk, _THINGS, *_SCALING)


def attentions(blk: Any) -> list[Any]:
    """Return what knows the ``num_heads`` of a parallel block."""
    return [part.attn for part in blk.attns] if is_named(blk, _THINGS) else [blk]


def first_norm(blk: Any) -> Any:
    """Return the norm before the (first) attention."""
    return blk.attns[0].norm if is_named(blk, _THINGS) else blk.in_norm


def parallel_block(outer: Any, blk: Any) -> Block:
    """``outer``: the block as it runs; ``blk``: what is inside."""
    things = is_named(blk, _THINGS)
    return Block(
        run=outer,
        norm1=identity,
        attn=partial(_sum, blk.attns) if things else partial(_added, outer),
        scale1=identity,
        norm2=identity,
        mlp=partial(_sum, blk.ffns) if things else torch.zeros_like,
        scale2=identity,
        qkv=_no_qkv,
        out=_no_qkv,
    )


def _sum(parts: Any, x: Tensor) -> Tensor:
    return torch.stack([part(x) for part in parts]).sum(dim=0)


def _added(outer: Any, x: Tensor) -> Tensor:
    """What a block of attention and FFN side by side adds to its tokens: they are one sum, in one place."""
    return outer(x) - x


def _no_qkv(x: Tensor) -> Any:
    raise TypeError(
        "these blocks hold several attentions, or attention and FFN side by side: there is no one q, k and v; use an "
        "adapter that leaves the inside of the attention alone"
    )
