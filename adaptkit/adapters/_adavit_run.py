"""One block under a decision, twice: masked (everything is computed) and packed (what is off is not).

With keep t of a token, m of a sub-layer and heads kept or off, both say (AdaViT, section 3.3)::

    x = x + t * m_msa * scale1(attn(norm1(x)))      attention among kept tokens
    x = x + t * m_ffn * scale2(mlp(norm2(x)))

An off token, sub-layer or image passes by unchanged. An off head gives zero (``"full"``) or each token's own value
(``"partial"``); the output projection keeps its bias. With ``only_prefix`` the patch tokens are read as keys and
values but not updated: all that a class-token classifier needs of the last block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import compress, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.adapters._adavit_gates import Decision
from adaptkit.adapters._adavit_heads import PLAIN, Products, by_image
from adaptkit.ops import onednn
from adaptkit.ops.device import eager_cpu
from adaptkit.ops.kept import index, masked_attention, packed_attention, packed_backend
from adaptkit.vit import Block, Projections

__all__ = ["Way", "dense", "masked", "packed"]

TILE = 512  #: rows that go through the FFN together on a CPU, so that its hidden layer stays in the cache


class Way(NamedTuple):
    """How a block is run, whatever is decided."""

    head_mode: str  #: "full" or "partial"
    only_prefix: bool
    #: On a CPU: attend image by image, each with the heads it keeps. Else with all heads, of which the others are
    #: zeroed, and short images of similar length together: more MACs in fewer calls.
    by_image: bool = True
    prepacked: onednn.Prepacked | None = None  #: weights that are laid out once, for inference on a CPU


def masked(block: Block, x: Tensor, h: Tensor, decision: Decision, way: Way) -> Tensor:
    """Tokens x (B, P+N, D) and h = norm1(x) -> (B, P+N, D), differentiable in the decision."""
    prefix = _prefix(block, x)
    keep = _all_rows(x, decision.patch, prefix)
    update = keep * (torch.arange(x.shape[1], device=x.device) < prefix) if way.only_prefix else keep
    m1, m2 = (None, None) if decision.layer is None else decision.layer[:, :, None, None].unbind(1)

    q, k, v = block.qkv(h)
    o = masked_attention(q, k, v, keep, block.scale, block.bias)
    if decision.head is not None:
        on = decision.head[:, :, None, None].to(o.dtype)
        o = o * on + v * (1 - on) if way.head_mode == "partial" else o * on
    x = x + _gated(block.scale1(block.out(o)), update, m1)
    return x + _gated(block.scale2(block.mlp(block.norm2(x))), update, m2)


def _prefix(block: Block, x: Tensor) -> int:
    """How many of the tokens (B, P+N, D) are class and register tokens."""
    return x.shape[1] - (0 if block.grid is None else block.grid[0] * block.grid[1])


def _all_rows(x: Tensor, patch: Tensor | None, prefix: int) -> Tensor:
    """Keep of every token (B, P+N): prefix tokens always."""
    if patch is None:
        return x.new_ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
    return F.pad(patch, (prefix, 0), value=1.0)


def _gated(update: Tensor, keep: Tensor, layer: Tensor | None) -> Tensor:
    gate = keep[..., None] if layer is None else keep[..., None] * layer
    return update * gate.to(update.dtype)


def dense(block: Block, x: Tensor, h: Tensor, decision: Decision, way: Way) -> Tensor:
    """Compute the block where everything is kept: on a CPU, where that gains, with the FFN in tiles through oneDNN."""
    x = x + block.scale1(block.attn(h))
    if not (onednn.usable(x) and _gains(block, way)):
        return x + block.scale2(block.mlp(block.norm2(x)))  # as the host does it, bit for bit
    x = x.contiguous()  # and a new one, which may be changed
    for tile in x.view(-1, x.shape[2]).split(TILE):
        mlp = partial(_ffn, block, way) if len(tile) == TILE else block.mlp
        tile += block.scale2(mlp(block.norm2(tile[None])))[0]
    return x


def packed(block: Block, x: Tensor, h: Tensor, decision: Decision, way: Way) -> Tensor:
    """Compute the same for hard decisions, from kept rows alone: gather, run, scatter."""
    count, tokens, dim = x.shape
    if count == 1:
        return _alone(block, x, h, decision, way)
    prefix = _prefix(block, x)
    keep = _all_rows(x, decision.patch, prefix) > 0  # (B, P+N)
    on = x.new_ones(2, count, dtype=torch.bool) if decision.layer is None else decision.layer.t() > 0
    rows = x.reshape(-1, dim).clone()
    kept = Kept.of(keep & on[0, :, None])
    if kept.lengths:
        normed = h.reshape(-1, dim).index_select(0, kept.places)
        places = kept.places[kept.of_prefix(prefix)] if way.only_prefix else kept.places
        _add(rows, places, block.scale1(_attention(block, normed, kept, decision.head, way, prefix)[None])[0])
    if way.only_prefix:
        keep = keep & (torch.arange(tokens, device=x.device) < prefix)
    places = (keep & on[1, :, None]).flatten().nonzero()[:, 0]
    for tile in places.split(TILE if eager_cpu(x) else max(1, len(places))):
        if len(tile):
            mlp = partial(_ffn, block, way) if len(tile) == TILE and onednn.usable(x) else block.mlp
            _add(rows, tile, block.scale2(mlp(block.norm2(rows.index_select(0, tile)[None])))[0])
    return rows.view(count, tokens, dim)


def _ffn(block: Block, way: Way, h: Tensor) -> Tensor:
    """``block.mlp`` of some rows, (1, R, D) -> (1, R, D), through oneDNN."""
    layers, mlp = block.perceptron(), onednn.mlp if way.prepacked is None else way.prepacked.mlp
    return block.mlp(h) if layers is None else mlp(h[0], *layers)[None]


def _products(way: Way, fast: bool) -> Products:
    if not fast:
        return PLAIN
    if way.prepacked is None:
        return Products(onednn.linear, onednn.linear_of_heads)
    return Products(way.prepacked.linear, way.prepacked.linear_of_heads, whole=True)


def _add(rows: Tensor, places: Tensor, update: Tensor) -> None:
    rows.index_copy_(0, places, (rows.index_select(0, places) + update).to(rows.dtype))


def _alone(block: Block, x: Tensor, h: Tensor, decision: Decision, way: Way) -> Tensor:
    """One image: its kept rows are gathered once and stay together for both sub-layers.

    The arithmetic of one image is over so soon that the number of operators counts, and lists are faster than tensors.
    """
    patch, on, layer = _lists(decision)
    msa, ffn = (1.0, 1.0) if layer is None else layer
    if not (msa or ffn):
        return x
    tokens, prefix = x.shape[1], _prefix(block, x)
    chosen = list(range(tokens))  # prefix tokens come first
    if patch is not None:
        chosen = [*range(prefix), *compress(range(prefix, tokens), patch)]
    weights = block.projections() if eager_cpu(x) else None
    count, fast = len(chosen), weights is not None and onednn.usable(x)
    whole = count == tokens and not way.only_prefix
    if whole and (on is None or all(on)) and not (fast and _gains(block, way)):  # as the host does it, bit for bit
        x = x + block.scale1(block.attn(h)) if msa else x
        return x + block.scale2(block.mlp(block.norm2(x))) if ffn else x
    if not chosen:
        return x
    if fast and not whole:  # the rows that round the number are copies of the first: not attended to, and dropped
        chosen += chosen[:1] * (onednn.rounded(count) - count)
    places = index(chosen).to(x.device)
    rows = x[0] if whole else x[0].index_select(0, places[:prefix] if way.only_prefix else places)
    if msa:
        normed = h[0] if whole else h[0].index_select(0, places)
        kept = Kept(places, [0], [len(chosen)], tokens)
        if weights is None:
            update = _attention(block, normed, kept, decision.head, way, prefix)
        else:
            products = _products(way, fast)
            update = _by_image(block, weights, normed, kept, [on], way, prefix, [count], products)
        rows = rows + block.scale1(update[None])[0]
    if ffn:
        run = partial(_ffn, block, way) if fast else block.mlp
        rows = rows + block.scale2(run(block.norm2(rows[None])))[0]
    if whole:
        return rows[None].to(x.dtype)
    count = min(count, len(rows))
    return x.index_copy(1, places[:count], rows[None, :count].to(x.dtype))


def _lists(decision: Decision) -> list[list[float] | None]:
    """What is decided for one image; a GPU is asked once for all three."""
    given = [keep[0] for keep in decision if keep is not None]
    if eager_cpu(given[0]):
        found = iter([keep.tolist() for keep in given])
    else:
        numbers = iter(torch.cat(given).tolist())
        found = iter([list(islice(numbers, len(keep))) for keep in given])
    return [None if keep is None else next(found) for keep in decision]


def _gains(block: Block, way: Way) -> bool:
    """Whether its layers are so large that oneDNN outweighs what the decision costs."""
    layers = block.perceptron()
    return way.prepacked is not None or (layers is not None and onednn.pays(layers.fc1.weight))


class Kept(NamedTuple):
    """Rows that attend, image after image; images without any are left out."""

    places: Tensor  #: (R,) in the flattened (B * (P+N))
    images: list[int]
    lengths: list[int]  #: rows of each of these images
    tokens: int  #: P+N

    @staticmethod
    def of(keep: Tensor) -> Kept:
        """From (B, P+N) booleans."""
        lengths = keep.sum(1).tolist()
        images = [i for i, n in enumerate(lengths) if n]
        return Kept(keep.flatten().nonzero()[:, 0], images, [lengths[i] for i in images], keep.shape[1])

    def positions(self) -> Tensor:
        """Place (R,) of each row in its own image."""
        return self.places % self.tokens

    def of_prefix(self, prefix: int) -> Tensor:
        """Which of the R rows are prefix tokens."""
        return (self.positions() < prefix).nonzero()[:, 0]


def _attention(block: Block, h: Tensor, kept: Kept, head: Tensor | None, way: Way, prefix: int) -> Tensor:
    """Normed rows h (R, D) -> their update before LayerScale (R, D), or (R', D) of the prefix tokens alone."""
    part = kept.of_prefix(prefix) if way.only_prefix else None
    slices = way.by_image and eager_cpu(h) and (head is not None or part is not None)
    weights = block.projections() if slices else None
    if weights is not None:
        table = None if head is None else head.tolist()
        on = [None if table is None else table[i] for i in kept.images]
        return _by_image(block, weights, h, kept, on, way, prefix, kept.lengths)
    if block.qkv_at is None:
        q, k, v = block.qkv(h[None])
    else:
        q, k, v = block.qkv_at(h[None], (kept.positions() - prefix).clamp_min(-1))
    biases = None if block.bias is None else _biases(block.bias, kept, q.shape[1])
    backend = packed_backend(q, block.bias, kept.lengths, not way.by_image)
    o = packed_attention(q, k, v, kept.lengths, block.scale, biases, backend)
    if part is not None:
        o, v = o[:, :, part], v[:, :, part]
    if head is not None:
        places = kept.places if part is None else kept.places[part]
        on = head.index_select(0, places // kept.tokens).t()[None, :, :, None].to(o.dtype)  # (1, heads, R', 1)
        o = o * on + v * (1 - on) if way.head_mode == "partial" else o * on
    return block.out(o)[0]


def _by_image(
    block: Block,
    weights: Projections,
    h: Tensor,
    kept: Kept,
    on: Sequence[list[float] | None],
    way: Way,
    prefix: int,
    keys: list[int],
    products: Products = PLAIN,
) -> Tensor:
    """Attention image by image: the first ``keys`` rows of each are attended to, with the heads that are ``on``."""
    biases = None if block.bias is None else _biases(block.bias, kept, weights.out_weight.shape[1])
    queries = prefix if way.only_prefix else None
    return by_image(weights, h.split(kept.lengths), on, biases, block.scale, way.head_mode, queries, keys, products)


def _biases(bias: Tensor, kept: Kept, heads: int) -> list[Tensor]:
    """Relative bias among the kept rows of each image, (1, heads, n, n)."""
    places = kept.positions().split(kept.lengths)
    bias = bias.expand(-1, heads, -1, -1)
    own = [bias[i : i + 1] if bias.shape[0] > 1 else bias for i in kept.images]
    return [b[:, :, p[:, None], p] for b, p in zip(own, places)]
