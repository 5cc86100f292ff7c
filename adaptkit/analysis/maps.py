"""What a query attends to: one map for each head of each block (DINO, Caron et al. 2021, figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptkit.analysis.attention import Attention, attentions
from adaptkit.analysis.seen import Seen, cell_of, check_query
from adaptkit.analysis.style import WIDTH, Drawn, colour_bar, pictured, share, show, star
from adaptkit.analysis.watch import Watched, single, source_of
from adaptkit.core.view import ViT

__all__ = ["AttentionMaps", "attention_maps", "query_cell"]

HEADS = 8  #: columns of a figure, at most


@dataclass(frozen=True, eq=False)
class AttentionMaps(Drawn):
    """Attention of one query on the patches of an image."""

    maps: dict[int, Tensor]  #: by block: (heads, h, w); what is missing to 1 is on class and register tokens
    query: tuple[float, float] | None  #: (y, x) in pixels; None: the class token
    strides: dict[int, int]  #: side of a cell in pixels, by block
    picture: np.ndarray

    def draw(self, figure: Any) -> None:
        """The image, then a column for each head, a row for each block; each map as a share of its 99th percentile."""
        heads = min(HEADS, max(len(m) for m in self.maps.values()))
        height, width = self.picture.shape[:2]
        side = min((WIDTH - 0.8) / (heads + 1), 1.6)
        figure.set_size_inches(side * (heads + 1) + 0.8, len(self.maps) * side * height / width + 0.25)
        grid = figure.add_gridspec(len(self.maps), heads + 1, wspace=0.02, hspace=0.02)
        middle = figure.add_subplot(grid[:, 0])
        middle.set_axis_off()
        show(middle, self.picture)
        middle.set_title("class token" if self.query is None else "query")
        if self.query is not None:
            star(middle, self.query)
        shown, used = None, []
        for row, (block, maps) in enumerate(self.maps.items()):
            for head, values in enumerate(maps[:heads]):
                axes = figure.add_subplot(grid[row, head + 1], xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                shown = show(axes, self.picture, share(values), self.strides[block], 1.0, vmin=0, vmax=1)
                if self.query is not None:
                    star(axes, self.query, 5)
                if head == 0:
                    axes.set_ylabel(f"block {block}")
                if row == 0:
                    axes.set_title(f"head {head}")
                used.append(axes)
        colour_bar(figure, shown, used, "attention (of its 99th percentile)")


def attention_maps(
    model: nn.Module,
    image: Tensor,
    query: tuple[float, float] | None = None,
    blocks: int | Sequence[int] | None = 1,
) -> AttentionMaps:
    """Return what one query attends to, head by head.

    Args:
        model, blocks: as :func:`attention_distance`, but for the last block alone where nothing is said.
        image: one, (C, H, W) or (1, C, H, W).
        query: (y, x) in pixels; None is the class token, or the middle of the image where there is none.

    Raises ``TypeError`` where a block's attention does not come apart, or its keys have moved (see ``query_keys``), and
    ``ValueError`` for a query outside of the image.
    """
    one = single(image)
    size = (one.shape[-2], one.shape[-1])
    found: dict[int, Tensor] = {}
    strides: dict[int, int] = {}
    vit = Watched.of(model).vit
    by_class_token = query is None and isinstance(vit, ViT) and vit.has_class_token
    at: list[tuple[float, float] | None] = [query]

    def keep(attention: Attention) -> None:
        seen = attention.patches
        if attention.full is not None and attention.prefix and by_class_token:
            row = attention.full[:, 0, attention.prefix :].unflatten(1, seen.grid)
        else:
            place = (size[0] / 2, size[1] / 2) if query is None else query
            row, at[0] = _row(attention, query_cell(place, seen, size)), place
        found[attention.block], strides[attention.block] = row.cpu(), seen.stride

    attentions(model, one, keep, blocks)
    (picture,) = pictured([one[0]], source_of(model, one.shape[1]))
    return AttentionMaps(found, at[0], strides, picture)


def _row(attention: Attention, query: int) -> Tensor:
    """Return the attention (heads, h, w) of one patch."""
    seen = attention.patches
    if seen.reference is not None:
        raise TypeError(
            f"block {attention.block} reads keys that have moved off the grid, which make no map; see query_keys"
        )
    grid, weights = seen.grid, seen.weights[query, :, 0]  # (heads, K)
    points = seen.points[query if len(seen.points) > 1 else 0, 0, 0]  # (K, 2)
    cell = (points / seen.stride).floor().long()
    flat = torch.zeros(len(weights), grid[0] * grid[1], device=weights.device)
    return flat.index_add(1, cell[:, 0] * grid[1] + cell[:, 1], weights).unflatten(1, grid)


def query_cell(query: tuple[float, float], seen: Seen, size: tuple[int, int]) -> int:
    """Return the index of the cell that holds a pixel (y, x). Raises ``ValueError`` for one outside of the image."""
    check_query(query, size)
    return cell_of(query, seen)
