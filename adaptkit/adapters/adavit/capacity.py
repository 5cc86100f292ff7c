"""One block under a hard decision, for a whole batch, with shapes that are known before the decision.

Gathering exactly the kept tokens makes the host wait in every block, for the decision sets the shapes. Here shapes come
from a :class:`Capacity`: how many images, tokens per image and rows of the FFN are gathered, kept ones first. The
equation of :mod:`~adaptkit.adapters.adavit.execution` runs on what was gathered, masked, so that tokens gathered beyond
the kept ones change nothing.

Capacities are estimated from the last forwards (:class:`Capacities`). Each block counts what it kept; the counts of all
blocks are read once, after the forward. Where a block kept more than its capacity, the forward is repeated with full
capacity. So the result is always exact, and a forward waits for the device once, or twice if it is repeated.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from adaptkit.adapters.adavit.execution import How, Masks, num_prefix_tokens, select_heads
from adaptkit.adapters.adavit.gates import Decision
from adaptkit.core.block import Block
from adaptkit.ops.grid import cells
from adaptkit.ops.masked_attention import masked_attention

__all__ = ["EVERYTHING", "Capacities", "Capacity", "counts", "packed_to"]

STEPS = 16  #: a capacity is so many sixteenths of everything: few shapes, for which a device must choose few kernels
HEADROOM = 1.125  #: how much more is gathered than was on lately
FORWARDS = 16  #: how many forwards "lately" is


class Capacity(NamedTuple):
    """How much a block gathers, in sixteenths."""

    images: int  #: of a batch, with MSA on
    tokens: int  #: of each of these images
    rows: int  #: of the FFN, in all images together

    def of(self, x: Tensor) -> Capacity:
        """Return the numbers for tokens x (B, T, D)."""
        images, tokens = x.shape[:2]
        return Capacity(*(cells(n * all_, STEPS) for n, all_ in zip(self, (images, tokens, images * tokens))))

    @property
    def share(self) -> float:
        """About which share of a block's work it leaves: a third is in MSA, two thirds are in the FFN."""
        return self.images * self.tokens / STEPS**2 / 3 + 2 * self.rows / STEPS / 3


EVERYTHING = Capacity(STEPS, STEPS, STEPS)


def packed_to(capacity: Capacity, block: Block, x: Tensor, h: Tensor, decision: Decision, how: How) -> Tensor:
    """Tokens x (B, T, D) and h = norm1(x) -> (B, T, D)."""
    capacity = capacity.of(x)
    masks, rows = Masks.of(block, x, decision, how), x.flatten(0, 1)  # (B*T, D)
    if capacity.images:
        image = _first(masks.msa.amax(1), capacity.images)  # (M,)
        token = _first(masks.keys[image], capacity.tokens)  # (M, K), prefix tokens first
        place = image[:, None] * x.shape[1] + token  # (M, K) in B*T
        update = block.scale1(_attention(block, h, masks.keys, image, token, decision.head, how))  # (M, queries, D)
        rows = _updated(rows, place[:, : update.shape[1]].flatten(), update.flatten(0, 1), masks.msa)
    if capacity.rows:
        place = _first(masks.ffn.flatten(), capacity.rows)  # (R,)
        rows = _updated(rows, place, block.scale2(block.mlp(block.norm2(rows[place][None])))[0], masks.ffn)
    return rows.view_as(x)


def _first(keep: Tensor, count: int) -> Tensor:
    """Return places (..., count) on the last axis: of what is kept, in order, and then of what is not."""
    return (keep <= 0).sort(dim=-1, stable=True).indices[..., :count]


def _updated(rows: Tensor, place: Tensor, update: Tensor, mask: Tensor) -> Tensor:
    """Rows (B*T, D) plus update (R, D) of those at place (R,) that are on in mask (B, T)."""
    on = mask.flatten()[place][:, None].to(update.dtype)
    return rows.index_copy(0, place, (rows[place] + update * on).to(rows.dtype))


def _attention(
    block: Block, h: Tensor, keep: Tensor, image: Tensor, token: Tensor, head: Tensor | None, how: How
) -> Tensor:
    """Attention in these images (M,) among these tokens (M, K), of which the kept ones (B, T) are keys.

    Of normed tokens h (B, T, D) -> (M, K, D), or (M, P, D) of the prefix tokens alone.
    """
    prefix = num_prefix_tokens(block, h)
    at = (image[:, None], token)
    if block.qkv_at is None:
        q, k, v = block.qkv(h[at])  # (M, H, K, E)
    else:
        rows = block.qkv_at(h[at].flatten(0, 1)[None], (token - prefix).clamp_min(-1).flatten())  # (1, H, M*K, E)
        q, k, v = (y[0].unflatten(1, token.shape).transpose(0, 1) for y in rows)
    queries = prefix if how.only_prefix else token.shape[1]
    bias = None if block.bias is None else _bias(block.bias, image, token)[:, :, :queries]
    o = masked_attention(q[:, :, :queries], k, v, keep[at], block.scale, bias)
    return block.out(select_heads(o, v[:, :, :queries], None if head is None else head[image], how.head_mode))


def _bias(bias: Tensor, image: Tensor, token: Tensor) -> Tensor:
    """Bias (1 or B, H, T, T) among the tokens (M, K) of these images (M,) -> (M, H, K, K)."""
    image = image if len(bias) > 1 else torch.zeros_like(image)
    return bias[image[:, None, None], :, token[:, :, None], token[:, None, :]].permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------ what is measured


def counts(masks: Masks, x: Tensor, capacity: Capacity) -> Tensor:
    """Return (4,): the shares of images, tokens and rows that are on, and 1 where that is more than the capacity."""
    msa, ffn, capacity = masks.msa.amax(1) > 0, masks.ffn > 0, capacity.of(x)
    tokens = ((masks.keys > 0) & msa[:, None]).sum(1).amax()
    numbers = torch.stack([msa.sum(), tokens, ffn.sum()])
    too_many = (numbers[0] > capacity.images) | (numbers[1] > capacity.tokens) | (numbers[2] > capacity.rows)
    shares = (numbers[0] / len(x), numbers[1] / x.shape[1], numbers[2] / (len(x) * x.shape[1]))
    return torch.stack([*shares, too_many.to(shares[0].dtype)])


class Capacities:
    """Estimates each block's capacity from what it kept in the last forwards."""

    def __init__(self) -> None:
        self._seen: deque[dict[int, tuple[float, ...]]] = deque(maxlen=FORWARDS)
        self._now: dict[int, Capacity] = {}

    def of(self, index: int) -> Capacity | None:
        """Return that of a block; None where it is not known, or some block had more on in the last forward."""
        return self._now.get(index)

    def learn(self, numbers: Mapping[int, list[float]]) -> bool:
        """Take the :func:`counts` of each block; return whether one had more on than its capacity."""
        self._seen.append({index: tuple(shares) for index, (*shares, _) in numbers.items()})
        if any(too_many for *_, too_many in numbers.values()):
            self._now = {}
            return True
        self._now = {index: self._enough(index) for index in numbers}
        return False

    def _enough(self, index: int) -> Capacity:
        seen = zip(*(shares[index] for shares in self._seen if index in shares))
        return Capacity(*(min(STEPS, math.ceil(STEPS * HEADROOM * max(shares))) for shares in seen))
