"""Attention image by image, each with the weights of the heads that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.ops.linear import linear
from adaptkit.vit import Projections

__all__ = ["by_image"]

Heads: TypeAlias = Tensor | None  #: places of the heads that are on, in their order; None: all
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_image(
    w: Projections,
    rows: Sequence[Tensor],
    on: Sequence[list[float] | None],
    biases: Sequence[Tensor] | None,
    scale: float | None,
    head_mode: str,
    queries: int | None,
    keys: Sequence[int],
) -> Tensor:
    """Normed rows (R, D) of each image -> their updates before LayerScale, end to end.

    Args:
        w: the host's weights.
        rows: of each image.
        on: which heads are on, not zero, in each image; None: all.
        biases: on the logits of each image, (1, all heads, R, R).
        scale: of the logits; None is ``1/sqrt(E)``.
        head_mode: what an off head gives, nothing (``"full"``) or each token's own value (``"partial"``).
        queries: how many of the first rows of each image ask; None: all. The others give keys and values alone.
        keys: how many of the first rows of each image are attended to.
    """
    outs = []
    for i, (h, image_on) in enumerate(zip(rows, on)):
        heads = None
        if image_on is not None and not all(image_on):
            heads = torch.tensor([j for j, keep in enumerate(image_on) if keep], device=h.device, dtype=torch.long)
        bias = None if biases is None else _choose(biases[i][:, :, :queries, : keys[i]], heads)
        attend = partial(_attend, w, keys[i], scale, bias)
        run = _full if heads is None or head_mode == "full" else _partial
        outs.append(run(w, h if queries is None else h[:queries], h, heads, attend))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _full(w: Projections, asking: Tensor, h: Tensor, heads: Heads, attend: Attend) -> Tensor:
    """(R', D), (R, D) -> (R', D) from these heads alone; the others give zero."""
    if heads is not None and len(heads) == 0:
        nothing = h.new_zeros(len(w.out_weight)) if w.out_bias is None else w.out_bias
        return nothing.expand(len(asking), -1)
    if asking is h:
        q, k, v = _project(w, 0, 3, h, heads)
    else:
        (q,), (k, v) = _project(w, 0, 1, asking, heads), _project(w, 1, 3, h, heads)
    return linear(attend(q, k, v).flatten(1), _choose(w.out_weight, heads).flatten(1), w.out_bias)


def _partial(w: Projections, asking: Tensor, h: Tensor, heads: Tensor, attend: Attend) -> Tensor:
    """(R', D), (R, D) -> (R', D); the other heads give each token's own value."""
    (v,) = _project(w, 2, 3, h, None)
    o = v[: len(asking)]
    if len(heads):
        (q,), (k,) = _project(w, 0, 1, asking, heads), _project(w, 1, 2, h, heads)
        o = o.index_copy(1, heads, attend(q, k, v.index_select(1, heads)).to(o.dtype))
    return linear(o.flatten(1), w.out_weight.flatten(1), w.out_bias)


def _choose(x: Tensor, heads: Heads) -> Tensor:
    """The heads that are on, of (..., all heads, ...) with the heads second. A copy of weights pays: one product."""
    return x if heads is None else x.index_select(1, heads)


def _project(w: Projections, first: int, last: int, h: Tensor, heads: Heads) -> list[Tensor]:
    """(R, D) -> each of q (0), k (1) and v (2) from ``first`` to ``last`` (left out), (R, heads that are on, E)."""
    if len(w.qkv) == 1:
        parts = [(w.qkv[0][first:last], None if w.qkv_bias[0] is None else w.qkv_bias[0][first:last])]
    else:
        parts = list(zip(w.qkv[first:last], w.qkv_bias[first:last]))
    found: list[Tensor] = []
    for weight, bias in parts:
        weight = _choose(weight, heads)
        bias = None if bias is None else _choose(bias, heads).flatten()
        found += linear(h, weight.flatten(0, 2), bias).view(len(h), *weight.shape[:3]).unbind(1)
    return found


def _attend(
    w: Projections, keys: int, scale: float | None, bias: Tensor | None, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Three of (R, heads, E) -> (R, heads, E)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (w.norms[0](q), w.norms[1](k[:keys]), v[:keys]))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)[0].transpose(0, 1)
