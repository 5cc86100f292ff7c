"""The attention of every block, as it ran on one image::

    A = softmax(q k^T * scale + bias)                                  (heads, queries, keys), rows sum to one

A fused kernel never writes A down, so it is computed anew from what the block was given, by the block's own parts.
Where an adapter stood inside the block, it is asked; where attention does not come apart, that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from adaptkit.adapters.adavit import AdaViT
from adaptkit.adapters.base import BlockAdapter
from adaptkit.adapters.dat import DATKV, DATBlock
from adaptkit.analysis.seen import Seen, moved
from adaptkit.analysis.watch import Watched, block_strides, chosen, run_watched
from adaptkit.core.block import Block
from adaptkit.core.view import ViT
from adaptkit.mixers.dat import attention_weights
from adaptkit.ops.grid import cell_centres

__all__ = ["Attention", "attentions", "centres"]

Grid = tuple[int, int]


class Attention(NamedTuple):
    """Attention of one block on one image."""

    block: int  #: its index
    #: (heads, P+N, P+N), the P prefix tokens first, or None where patches have other keys than all tokens
    full: Tensor | None
    patches: Seen  #: of patches on patches: where each query reads, and with which weights

    @property
    def prefix(self) -> int:
        """Number of prefix tokens P."""
        return 0 if self.full is None else self.full.shape[1] - self.patches.grid[0] * self.patches.grid[1]


def attentions(
    model: nn.Module,
    image: Tensor,
    visit: Callable[[Attention], None],
    blocks: int | Sequence[int] | None = None,
) -> None:
    """Run an image (1, C, H, W) and show each block's attention to ``visit``, one after another: all are large.

    Without ``blocks`` those that have none, as the pooling of PoolFormer, are left out.

    Raises ``TypeError``, with the reason, where no block shows its attention or one that was named does not.
    """
    watched = Watched.of(model)
    taken = chosen(blocks, watched.vit.spec.depth)
    strides, refused, shown = block_strides(watched.vit.spec), {}, []
    deciding = [a for a in watched.acting if isinstance(a, BlockAdapter) and a.inside and not isinstance(a, DATKV)]
    if deciding:
        see = "see kept_patches, or " if isinstance(deciding[0], AdaViT) else ""
        raise TypeError(
            f"{type(deciding[0]).__name__} changes which tokens attend in a block, so the attention of the frozen "
            f"blocks is not what ran; {see}look inside model.disable_adapter()"
        )
    moving = next((a for a in watched.acting if isinstance(a, DATKV)), None)

    def look(block: Block, index: int, x: Tensor, y: Tensor) -> None:
        if index not in taken:
            return
        try:
            found = _attention(watched.vit, block, index, x, strides[index], moving)
        except TypeError as error:
            refused[index] = str(error)
        else:
            shown.append(index)
            visit(found)

    with torch.no_grad():
        run_watched(model, image, look)
    if refused and (blocks is not None or not shown):
        index, why = next(iter(refused.items()))
        raise TypeError(
            f"block {index} of {watched.vit.spec.family} does not show its attention: {why} (feature_pca and spectrum "
            "look at what blocks give, whatever they do)"
        )


def _attention(vit: Any, block: Block, index: int, x: Tensor, stride: int, moving: DATKV | None) -> Attention:
    """Look at one block that was given x (1, P+N, D)."""
    grid = cast(Grid, block.grid)
    replaced = moving is not None and moving.config.mode == "replace"  # else its branch is beside the frozen attention
    if moving is not None and replaced and index in moving.config.blocks:
        return Attention(index, None, moved(cast(DATBlock, moving.blocks[str(index)]), block, x, stride))
    at = centres(grid, stride, x.device)
    if block.attended is not None:
        weights, keys = block.attended(block.norm1(x))  # (1, heads, N, K), (N, K)
        points = at[keys][:, None, None]  # (N, 1, 1, K, 2)
        return Attention(index, None, Seen(points, weights[0].transpose(0, 1)[:, :, None].float(), grid, stride))
    if not isinstance(vit, ViT):
        block.qkv(x)  # says why it has none
    q, k, _ = block.qkv(block.norm1(x))
    bias = None if block.bias is None else block.bias.float()
    with torch.autocast(x.device.type, enabled=False):  # rows that sum to one, whatever the model runs in
        full = attention_weights(q.float(), k.float(), bias, block.scale)[0]  # (heads, P+N, P+N)
    prefix = x.shape[1] - grid[0] * grid[1]
    own = full[:, prefix:, prefix:].transpose(0, 1)  # (N, heads, N)
    return Attention(index, full, Seen(at[None, None, None], own[:, :, None], grid, stride))


def centres(grid: Grid, stride: int, device: Any = None) -> Tensor:
    """Return the centres (h*w, 2) of cells as (y, x) in pixels, row by row."""
    return cell_centres(grid, stride, device or torch.device("cpu"), torch.float32).flip(-1)
