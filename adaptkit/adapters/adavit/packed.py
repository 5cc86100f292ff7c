"""One block under a hard decision, image by image: gather the kept rows, run them, scatter them back.

It says what :mod:`~adaptkit.adapters.adavit.execution` says, and multiplies what the decision leaves and nothing else:
kept rows, heads that are on, sub-layers that are on. ``adaptkit._cpu.adavit`` says it faster on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.adapters.adavit.execution import How, num_prefix_tokens, select_heads
from adaptkit.adapters.adavit.gates import Decision
from adaptkit.core.block import Block, Projections
from adaptkit.seam import accelerated

__all__ = ["dense", "packed", "skipping"]


@accelerated
def skipping(block: Block, x: Tensor, h: Tensor, decision: Decision, how: How) -> Tensor:
    """Skip what is off; compute the block as the backbone does where nothing is."""
    if decision.keeps_everything() and not how.only_prefix:
        return dense(block, x, h)
    return packed(block, x, h, decision, how)


def dense(block: Block, x: Tensor, h: Tensor) -> Tensor:
    """Tokens x (B, T, D) and h = norm1(x) -> (B, T, D), everything kept."""
    x = x + block.scale1(block.attn(h))
    return x + block.scale2(block.mlp(block.norm2(x)))


@accelerated
def packed(block: Block, x: Tensor, h: Tensor, decision: Decision, how: How) -> Tensor:
    """Tokens x (B, T, D) and h = norm1(x) -> (B, T, D)."""
    return torch.cat([_one(block, x, h, decision, how, i) for i in range(len(x))])


def _one(block: Block, x: Tensor, h: Tensor, decision: Decision, how: How, i: int) -> Tensor:
    """(B, T, D) -> (1, T, D) of image ``i``."""
    prefix = num_prefix_tokens(block, x)
    kept = torch.arange(x.shape[1], device=x.device)
    if decision.patch is not None:
        kept = kept[F.pad(decision.patch[i], (prefix, 0), value=1.0) > 0]  # (R,)
    places = kept[:prefix] if how.only_prefix else kept
    msa, ffn = (1.0, 1.0) if decision.layer is None else decision.layer[i].tolist()

    rows = x[i : i + 1, places]
    if msa and len(places):
        on = None if decision.head is None else decision.head[i : i + 1]
        bias = None if block.bias is None else block.bias[i % len(block.bias)][None, :, kept[:, None], kept]
        rows = rows + block.scale1(_attention(block, h[i : i + 1, kept], kept - prefix, len(places), on, bias, how))
    if ffn and len(places):
        rows = rows + block.scale2(block.mlp(block.norm2(rows)))
    return x[i : i + 1].index_copy(1, places, rows.to(x.dtype))


def _attention(
    block: Block, h: Tensor, patches: Tensor, queries: int, head: Tensor | None, bias: Tensor | None, how: How
) -> Tensor:
    """Kept rows h (1, R, D) of one image, at these patches (below 0: prefix tokens) -> (1, queries, D)."""
    bias = None if bias is None else bias[:, :, :queries]  # (1, H, queries, R)
    weights = None if head is None and queries == h.shape[1] else block.projections()
    if weights is not None:
        on = torch.arange(weights.out_weight.shape[1], device=h.device) if head is None else head[0].nonzero()[:, 0]
        return _of_heads(weights, h, queries, on, block.scale, bias, how.head_mode)
    q, k, v = block.qkv(h) if block.qkv_at is None else block.qkv_at(h, patches.clamp_min(-1))
    o = F.scaled_dot_product_attention(q[:, :, :queries], k, v, attn_mask=bias, scale=block.scale)
    return block.out(select_heads(o, v[:, :, :queries], head, how.head_mode))


def _of_heads(
    w: Projections, h: Tensor, queries: int, on: Tensor, scale: float | None, bias: Tensor | None, head_mode: str
) -> Tensor:
    """Attend with the heads ``on`` (n,) alone: (1, R, D) -> (1, queries, D)."""
    weights = [weight for part in w.qkv for weight in part]  # of q, k and v, each (H, E, D)
    biases = [None if part is None else part[j] for weight, part in zip(w.qkv, w.qkv_bias) for j in range(len(weight))]

    def project(which: int, rows: Tensor, heads: Tensor) -> Tensor:  # (1, R, D) -> (1, n, R, E)
        weight, bias = weights[which][heads], biases[which]
        product = F.linear(rows, weight.flatten(0, 1), None if bias is None else bias[heads].flatten())
        return product.unflatten(2, weight.shape[:2]).transpose(1, 2)

    every = torch.arange(len(weights[0]), device=h.device)
    q, k = w.norms[0](project(0, h[:, :queries], on)), w.norms[1](project(1, h, on))
    values = project(2, h, every if head_mode == "partial" else on)  # an off head hands its values on
    v = values[:, on] if head_mode == "partial" else values
    bias = bias if bias is None or bias.shape[1] == 1 else bias[:, on]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale) if len(on) else q
    if head_mode == "partial":
        o, on = values[:, :, :queries].index_copy(1, on, o.to(values.dtype)), every
    return F.linear(o.transpose(1, 2).flatten(2), w.out_weight[:, on].flatten(1), w.out_bias)
