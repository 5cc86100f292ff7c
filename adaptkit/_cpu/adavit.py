"""AdaViT's packing on a CPU: the rows of all images in tiles that stay in the cache, products through oneDNN.

On a CPU what is decided can be read at no cost, so that exactly the kept rows are gathered. Attention runs image by
image with the weights of the heads that are on, or, where few heads are off, short images of similar length together
with all heads: more MACs in fewer calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from adaptkit._cpu import onednn
from adaptkit._cpu.heads import PLAIN, Products, by_image
from adaptkit._cpu.packed_attention import SHORT, index, packed_attention
from adaptkit.adapters.adavit import packed as text
from adaptkit.adapters.adavit.execution import How, Masks, masked, num_prefix_tokens
from adaptkit.adapters.adavit.gates import Decision
from adaptkit.core.block import Block, Projections
from adaptkit.seam import fast_path

TILE = 512  #: rows that go through the FFN together, so that its hidden layer stays in the cache
CALL_MACS = 4e6  #: what one more call per image costs on a core, in MACs that it could have done instead


def _keeps_no_gradient(*args: object) -> bool:
    return not torch.is_grad_enabled()


# --------------------------------------------------------------------------------------------------- what is chosen


class Usage(NamedTuple):
    """How much a decision keeps."""

    everything: bool  #: whether nothing is off
    patch: float  #: share of the patches that is kept, over all images; 1 without such a gate
    head: float
    layer: float

    @staticmethod
    def of(decision: Decision) -> Usage:
        """Read it off a decision."""
        given = [keep for keep in decision if keep is not None]
        numbers = iter(torch.stack([number for keep in given for number in (keep.min(), keep.mean())]).tolist())
        pairs = [(1.0, 1.0) if keep is None else (next(numbers), next(numbers)) for keep in decision]
        return Usage(min(least for least, _ in pairs) > 0, *(mean for _, mean in pairs))


@fast_path(text.skipping, is_supported=_keeps_no_gradient)
def skipping(block: Block, x: Tensor, h: Tensor, decision: Decision, how: How) -> Tensor:
    """Skip what is off as far as that is faster, and compute the rest all the same."""
    if len(x) == 1:
        return _alone(block, x, h, decision, how)
    usage = Usage.of(decision)
    if usage.everything and not how.only_prefix:
        return _dense(block, x, h, how)
    slices = decision.head is not None and _slicing_is_profitable(x, decision, usage)
    if not _is_profitable(x, usage, how, slices):
        return masked(block, x, h, decision, how)
    return _together(block, x, h, decision, how, slices)


@fast_path(text.packed, is_supported=_keeps_no_gradient)
def packed(block: Block, x: Tensor, h: Tensor, decision: Decision, how: How) -> Tensor:
    """Skip all that is off."""
    if len(x) == 1:
        return _alone(block, x, h, decision, how)
    return _together(block, x, h, decision, how, slices=True)


def _slicing_is_profitable(x: Tensor, decision: Decision, usage: Usage) -> bool:
    """Whether the heads that are off outweigh running attention image by image, each with weights of its own."""
    rows = x.shape[1] if decision.patch is None else usage.patch * decision.patch.shape[1]
    return 4 * rows * x.shape[2] ** 2 * (1.0 - usage.head) > CALL_MACS


def _is_profitable(x: Tensor, usage: Usage, how: How, slices: bool) -> bool:
    """Whether the work that is off outweighs gathering rows and calling image by image."""
    count, tokens, dim = x.shape
    keep, on = usage.patch, usage.layer
    saved = (1.0 - (keep if not how.only_prefix else 0.0) * on) * count * tokens * 12 * dim * dim
    one_by_one = slices or keep * tokens > SHORT
    return saved > CALL_MACS * (1 + (count * on if one_by_one else 2))


# ---------------------------------------------------------------------------------------------------- several images


def _dense(block: Block, x: Tensor, h: Tensor, how: How) -> Tensor:
    """Everything is kept: the FFN in tiles through oneDNN where that is faster."""
    if not _onednn_is_faster(block, how):
        return text.dense(block, x, h)  # as the backbone does it, bit for bit
    x = (x + block.scale1(block.attn(h))).contiguous()  # a new one, which may be changed
    for tile in x.view(-1, x.shape[2]).split(TILE):
        mlp = _mlp(block, how) if len(tile) == TILE else block.mlp
        tile += block.scale2(mlp(block.norm2(tile[None])))[0]
    return x


def _together(block: Block, x: Tensor, h: Tensor, decision: Decision, how: How, slices: bool) -> Tensor:
    """The kept rows of all images end to end; with ``slices`` attention has the weights of each image's heads alone."""
    dim, prefix = x.shape[2], num_prefix_tokens(block, x)
    masks = Masks.of(block, x, decision, how)
    on = x.new_ones(len(x)) if decision.layer is None else decision.layer[:, 0]
    rows = x.reshape(-1, dim).clone()  # (B*T, D)
    kept = PackedRows.of((masks.keys > 0) & (on > 0)[:, None])
    if kept.lengths:
        normed = h.reshape(-1, dim).index_select(0, kept.places)
        places = kept.places[kept.of_prefix(prefix)] if how.only_prefix else kept.places
        _add(rows, places, block.scale1(_attention(block, normed, kept, decision.head, how, prefix, slices)[None])[0])
    for tile in (masks.ffn > 0).flatten().nonzero()[:, 0].split(TILE):
        if len(tile):
            mlp = _mlp(block, how) if len(tile) == TILE else block.mlp
            _add(rows, tile, block.scale2(mlp(block.norm2(rows.index_select(0, tile)[None])))[0])
    return rows.view(x.shape)


def _add(rows: Tensor, places: Tensor, update: Tensor) -> None:
    rows.index_copy_(0, places, rows.index_select(0, places) + update)


class PackedRows(NamedTuple):
    """Rows that attend, image after image; images without any are left out."""

    places: Tensor  #: (R,) in the flattened (B * T)
    images: list[int]
    lengths: list[int]  #: rows of each of these images
    tokens: int  #: T

    @staticmethod
    def of(keep: Tensor) -> PackedRows:
        """From (B, T) booleans."""
        lengths = keep.sum(1).tolist()
        images = [i for i, n in enumerate(lengths) if n]
        return PackedRows(keep.flatten().nonzero()[:, 0], images, [lengths[i] for i in images], keep.shape[1])

    def positions(self) -> Tensor:
        """Place (R,) of each row in its own image."""
        return self.places % self.tokens

    def of_prefix(self, prefix: int) -> Tensor:
        """Which of the R rows are prefix tokens."""
        return (self.positions() < prefix).nonzero()[:, 0]


def _attention(
    block: Block, h: Tensor, kept: PackedRows, head: Tensor | None, how: How, prefix: int, slices: bool = True
) -> Tensor:
    """Normed rows h (R, D) -> their update before LayerScale (R, D), or (R', D) of the prefix tokens alone."""
    part = kept.of_prefix(prefix) if how.only_prefix else None
    weights = block.projections() if slices and (head is not None or part is not None) else None
    if weights is not None:
        table = None if head is None else head.tolist()
        on = [None if table is None else table[i] for i in kept.images]
        return _by_image(block, weights, h, kept, on, how, prefix, kept.lengths)
    if block.qkv_at is None:
        q, k, v = block.qkv(h[None])  # (1, H, R, E)
    else:
        q, k, v = block.qkv_at(h[None], (kept.positions() - prefix).clamp_min(-1))
    biases = None if block.bias is None else _biases(block.bias, kept, q.shape[1])
    o = packed_attention(q, k, v, kept.lengths, block.scale, biases, together=not slices)
    if part is not None:
        o, v = o[:, :, part], v[:, :, part]
    if head is not None:
        places = kept.places if part is None else kept.places[part]
        each = head.index_select(0, places // kept.tokens).t()[None, :, :, None].to(o.dtype)  # (1, H, R', 1)
        o = o * each + v * (1 - each) if how.head_mode == "partial" else o * each
    return block.out(o)[0]


def _by_image(
    block: Block,
    weights: Projections,
    h: Tensor,
    kept: PackedRows,
    on: Sequence[list[float] | None],
    how: How,
    prefix: int,
    keys: list[int],
    products: Products = PLAIN,
) -> Tensor:
    """Attention image by image: the first ``keys`` rows of each are attended to, with the heads that are ``on``."""
    biases = None if block.bias is None else _biases(block.bias, kept, weights.out_weight.shape[1])
    queries = prefix if how.only_prefix else None
    return by_image(weights, h.split(kept.lengths), on, biases, block.scale, how.head_mode, queries, keys, products)


def _biases(bias: Tensor, kept: PackedRows, heads: int) -> list[Tensor]:
    """Relative bias among the kept rows of each image, (1, H, n, n)."""
    places = kept.positions().split(kept.lengths)
    bias = bias.expand(-1, heads, -1, -1)
    own = [bias[i : i + 1] if bias.shape[0] > 1 else bias for i in kept.images]
    return [b[:, :, p[:, None], p] for b, p in zip(own, places)]


# -------------------------------------------------------------------------------------------------------- one image


def _alone(block: Block, x: Tensor, h: Tensor, decision: Decision, how: How) -> Tensor:
    """One image: its kept rows are gathered once and stay together for both sub-layers.

    The arithmetic of one image is over so soon that the number of operators counts, and lists are faster than tensors.
    """
    patch, on, layer = (None if keep is None else keep[0].tolist() for keep in decision)
    msa, ffn = (1.0, 1.0) if layer is None else layer
    if not (msa or ffn):
        return x
    tokens, prefix = x.shape[1], num_prefix_tokens(block, x)
    chosen = list(range(tokens))  # prefix tokens come first
    if patch is not None:
        chosen = [*range(prefix), *compress(range(prefix, tokens), patch)]
    weights = block.projections()
    count, fast = len(chosen), weights is not None and onednn.is_available()
    whole = count == tokens and not how.only_prefix
    if (
        whole and (on is None or all(on)) and not (fast and _onednn_is_faster(block, how))
    ):  # as the backbone does it, bit for bit
        x = x + block.scale1(block.attn(h)) if msa else x
        return x + block.scale2(block.mlp(block.norm2(x))) if ffn else x
    if not chosen:
        return x
    if fast and not whole:  # the rows that round the number are copies of the first: not attended to, and dropped
        chosen += chosen[:1] * (onednn.rounded(count) - count)
    places = index(chosen)
    rows = x[0] if whole else x[0].index_select(0, places[:prefix] if how.only_prefix else places)
    if msa:
        normed = h[0] if whole else h[0].index_select(0, places)
        kept = PackedRows(places, [0], [len(chosen)], tokens)
        if weights is None:
            update = _attention(block, normed, kept, decision.head, how, prefix)
        else:
            products = _products(how) if fast else PLAIN
            update = _by_image(block, weights, normed, kept, [on], how, prefix, [count], products)
        rows = rows + block.scale1(update[None])[0]
    if ffn:
        mlp = _mlp(block, how) if fast else block.mlp
        rows = rows + block.scale2(mlp(block.norm2(rows[None])))[0]
    if whole:
        return rows[None]
    count = min(count, len(rows))
    return x.index_copy(1, places[:count], rows[None, :count])


# --------------------------------------------------------------------------------------------------- through oneDNN


def _onednn_is_faster(block: Block, how: How) -> bool:
    """Whether its layers are so large that oneDNN outweighs what the decision costs."""
    layers = block.mlp_layers()
    if not onednn.is_available():
        return False
    return how.layouts is not None or (layers is not None and onednn.is_profitable(layers.fc1.weight))


def _mlp(block: Block, how: How) -> Callable[[Tensor], Tensor]:
    """``block.mlp`` of some rows, (1, R, D) -> (1, R, D), through oneDNN where it comes apart."""
    layers = block.mlp_layers() if onednn.is_available() else None
    if layers is None:
        return block.mlp
    mlp = onednn.mlp if how.layouts is None else onednn.Prepacked(how.layouts).mlp
    return lambda h: mlp(h[0], *layers)[None]


def _products(how: How) -> Products:
    if how.layouts is None:
        return Products(onednn.linear, onednn.linear_of_heads)
    prepacked = onednn.Prepacked(how.layouts)
    return Products(prepacked.linear, prepacked.linear_of_heads, whole=True)
