"""How far attention looks (ViT, Dosovitskiy et al. 2021, figure 7, right, and figure 11).

For head h of a block, over queries q and images::

    d_h = mean_q  sum_k A_hqk |p_q - p_k|  /  sum_k A_hqk

with p in pixels and k over patches: class and register tokens have no place, so what they get is left out. Attention
that is spent evenly on 14 x 14 patches of 16 pixels has d = 116.49, attention on oneself d = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.analysis.attention import Attention, attentions, centres
from adaptkit.analysis.seen import Seen
from adaptkit.analysis.style import COLOURS, Drawn
from adaptkit.analysis.watch import batch

__all__ = ["AttentionDistance", "attention_distance", "distances", "even_distance"]


@dataclass(frozen=True, eq=False)
class AttentionDistance(Drawn):
    """Mean distance of attention in pixels, by block and head."""

    blocks: tuple[int, ...]  #: those that show their attention
    distances: tuple[Tensor, ...]  #: of each: (heads,), pixels
    even: tuple[float, ...]  #: of each: what attention spent evenly on the whole grid would have
    images: int  #: over how many it is the mean

    def draw(self, figure: Any) -> None:
        """A dot for each head against depth, their mean, and the distance of even attention."""
        figure.set_size_inches(3.4, 2.5)
        axes = figure.add_subplot()
        for i, (block, values) in enumerate(zip(self.blocks, self.distances)):
            label = "one head" if i == 0 else None
            axes.plot([block] * len(values), values, "o", color=COLOURS[0], alpha=0.6, mew=0, label=label)
        means = [float(values.mean()) for values in self.distances]
        axes.plot(self.blocks, means, "-", color=COLOURS[5], label="mean of heads")
        axes.plot(self.blocks, self.even, "--", color="0.5", lw=1, label="even attention")
        axes.set_xlabel("block")
        axes.set_ylabel("mean attention distance (pixels)")
        axes.set_ylim(0, 1.08 * max([1.0, *self.even, *(float(v.max()) for v in self.distances)]))  # 1: of one patch
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside upper center", ncols=3)


def attention_distance(
    model: nn.Module, images: Tensor | Sequence[Tensor], blocks: int | Sequence[int] | None = None
) -> AttentionDistance:
    """Measure how far each head looks, over some images.

    Args:
        model: what ``attach`` returned, or a bare backbone.
        images: (B, C, H, W) or (C, H, W), normalised as the backbone wants them, or a list of any sizes.
        blocks: indices, the last so many, or None for all.

    Raises ``TypeError`` where attention does not come apart, with the reason.
    """
    given = batch(images)
    sums: dict[int, Tensor] = {}
    even: dict[int, float] = {}

    def add(attention: Attention) -> None:
        seen = attention.patches
        mean = distances(seen).mean(0).cpu()
        sums[attention.block] = sums.get(attention.block, 0) + mean
        even[attention.block] = even.get(attention.block, 0.0) + even_distance(seen.grid, seen.stride)

    for image in given:
        attentions(model, image, add, blocks)
    count = len(given)
    return AttentionDistance(
        tuple(sums), tuple(s / count for s in sums.values()), tuple(e / count for e in even.values()), count
    )


def distances(seen: Seen) -> Tensor:
    """Return how far the heads of each query look: (Q, heads), pixels."""
    queries, heads = seen.weights.shape[:2]
    at = centres(seen.grid, seen.stride, seen.points.device)
    apart = (seen.points - at[:, None, None, None]).norm(dim=-1)  # (Q, G, L, K)
    weights = seen.weights.unflatten(1, (apart.shape[1], -1))  # (Q, G, heads / G, L, K)
    weights = weights / weights.sum((-2, -1), keepdim=True).clamp_min(1e-12)
    return (weights * apart[:, :, None]).sum((-2, -1)).reshape(queries, heads)


def even_distance(grid: tuple[int, int], stride: int) -> float:
    """Return the mean distance of attention that is spent evenly on a grid, in pixels.

    A difference of d cells occurs n - |d| times on an axis of n, so that no pair is looked at twice.
    """
    apart = [torch.arange(1 - n, n, dtype=torch.float64) for n in grid]
    often = [(n - d.abs()) / n**2 for n, d in zip(grid, apart)]
    return stride * float((often[0][:, None] * often[1] * torch.hypot(apart[0][:, None], apart[1])).sum())
