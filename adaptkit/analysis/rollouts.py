"""Attention rollout (Abnar and Zuidema 2020; ViT, figures 6 and 14): where the tokens at the end come from.

R = prod_l  (A_l + I) / 2,       A_l the mean over the heads, the last block leftmost, rows summing to one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from adaptkit.analysis.attention import Attention, attentions
from adaptkit.analysis.style import WIDTH, Drawn, colour_bar, panels, pictured, share, show
from adaptkit.analysis.watch import Watched, batch, source_of
from adaptkit.core.layers import check_choice
from adaptkit.core.view import ViT

__all__ = ["Rollout", "rollout"]


@dataclass(frozen=True, eq=False)
class Rollout(Drawn):
    """How much of each input token is in each output token."""

    matrices: tuple[Tensor, ...]  #: of each image: (P+N, P+N), rows sum to one
    grids: tuple[tuple[int, int], ...]
    stride: int  #: side of a patch in pixels
    prefix: int  #: number of class and register tokens P
    pictures: tuple[np.ndarray, ...]
    class_token: bool = True  #: whether the first of the prefix tokens is a class token

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """Of each image: how much of each patch (h, w) is in the class token, or, without one, in the mean patch."""
        summed = self.class_token and self.prefix > 0
        rows = [m[0] if summed else m[self.prefix :].mean(0) for m in self.matrices]
        return tuple(row[self.prefix :].unflatten(0, grid) for row, grid in zip(rows, self.grids))

    def draw(self, figure: Any) -> None:
        """Each image, and beside it the map, as a share of its 99th percentile."""
        height, width = self.pictures[0].shape[:2]
        axes = panels(figure, 2 * len(self.pictures), 6, height / width, width=WIDTH - 0.8, bar=0.8)
        shown = None
        for left, right, picture, values in zip(axes[::2], axes[1::2], self.pictures, self.maps):
            show(left, picture)
            shown = show(right, picture, share(values), self.stride, 1.0, vmin=0, vmax=1)
        colour_bar(figure, shown, axes, "rollout\n(of its 99th\npercentile)")


def rollout(
    model: nn.Module,
    images: Tensor | Sequence[Tensor],
    blocks: int | Sequence[int] | None = None,
    heads: Literal["mean", "max"] = "mean",
) -> Rollout:
    """Multiply the attention of all blocks.

    Args:
        model, images, blocks: as :func:`attention_distance`; ``blocks`` leaves the others out of the product.
        heads: A_l is the mean over them, as in the papers, or their maximum with rows made to sum to one.

    Raises ``TypeError`` for a hierarchical backbone, whose tokens are others in each stage, and where a block does not
    show the attention of all tokens on all.
    """
    check_choice("heads", heads, ("mean", "max"))
    watched, given = Watched.of(model), batch(images)
    if not isinstance(watched.vit, ViT):
        raise TypeError(
            f"{watched.vit.spec.family} has other tokens in each stage, so that their attention cannot be multiplied; "
            "rollout takes a plain ViT"
        )
    seen = [_product(model, image, blocks, heads) for image in given]
    shown = pictured([i[0] for i in given], source_of(model, given[0].shape[1]))
    matrices = tuple(product.cpu() for product, _ in seen)
    grids = tuple(last.patches.grid for _, last in seen)
    prefix, class_token = seen[0][1].prefix, watched.vit.has_class_token
    return Rollout(matrices, grids, watched.vit.spec.patch_size, prefix, shown, class_token)


def _product(model: nn.Module, image: Tensor, blocks: Any, heads: str) -> tuple[Tensor, Attention]:
    """Return the product for one image, and the last attention in it."""
    kept: list[tuple[Tensor, Attention]] = []

    def multiply(attention: Attention) -> None:
        if attention.full is None:
            raise TypeError(f"block {attention.block} reads moved keys, which are no tokens, so there is no product")
        step = mixed(attention.full, heads)
        with torch.autocast(step.device.type, enabled=False):
            kept[:] = [(step @ kept[0][0] if kept else step, attention._replace(full=attention.full[:1]))]

    attentions(model, image, multiply, blocks)
    return kept[0]


def mixed(full: Tensor, heads: str) -> Tensor:
    """Attention (heads, P+N, P+N) -> one step of the product (P+N, P+N), rows summing to one."""
    a = full.mean(0) if heads == "mean" else full.amax(0)
    a = a + torch.eye(len(a), dtype=a.dtype, device=a.device) * (1 if heads == "mean" else a.sum(-1, keepdim=True))
    return a / a.sum(-1, keepdim=True)
