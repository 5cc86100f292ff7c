"""Attention image by image, each with the weights of the heads that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.vit import Projections

__all__ = ["by_image"]

Heads: TypeAlias = Tensor | slice | None  #: places of heads that are on, or neighbours; None: all
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  #: as ``F.linear``
Attend = Callable[[Tensor, Tensor, Tensor, Heads], Tensor]


def by_image(
    w: Projections,
    rows: Sequence[Tensor],
    on: Sequence[list[float] | None],
    biases: Sequence[Tensor] | None,
    scale: float | None,
    head_mode: str,
    queries: int | None,
    keys: Sequence[int],
    product: Product | None,
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
        product: of all heads that are on, whose weights are copied for it; None: one for each stretch of heads.
    """
    outs = []
    for i, (h, image_on) in enumerate(zip(rows, on)):
        pieces = _pieces(image_on, product is not None)
        bias = None if biases is None else biases[i][:, :, :queries, : keys[i]]
        attend = partial(_attend, w, keys[i], scale, bias)
        run = _full if pieces == [None] or head_mode == "full" else _partial
        outs.append(run(w, product or F.linear, h if queries is None else h[:queries], h, pieces, attend))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _pieces(on: list[float] | None, joined: bool) -> list[Heads]:
    """Heads that are on: all of them as one choice, or as stretches of neighbours, whose weights are views."""
    if on is None or all(on):
        return [None]
    if joined:
        return [torch.tensor([j for j, keep in enumerate(on) if keep])] if any(on) else []
    edges = [j for j, (a, b) in enumerate(zip([0, *on], [*on, 0])) if bool(a) != bool(b)]
    return [slice(*pair) for pair in zip(edges[::2], edges[1::2])]


def _full(w: Projections, product: Product, asking: Tensor, h: Tensor, pieces: list[Heads], attend: Attend) -> Tensor:
    """(R', D), (R, D) -> (R', D) from these heads alone; the others give zero."""
    out = h.new_zeros(len(w.out_weight)) if w.out_bias is None else w.out_bias
    for heads in pieces:
        if asking is h and not isinstance(heads, slice):
            q, k, v = _project(w, product, 0, 3, h, heads)
        else:
            q, k, v = (_project(w, product, j, j + 1, h if j else asking, heads)[0] for j in range(3))
        o, weight = attend(q, k, v, heads).flatten(1), _choose(w.out_weight, heads).flatten(1)
        out = torch.addmm(out, o, weight.t()) if isinstance(heads, slice) else product(o, weight, w.out_bias)
    return out if out.ndim == 2 else out.expand(len(asking), -1)


def _partial(
    w: Projections, product: Product, asking: Tensor, h: Tensor, pieces: list[Heads], attend: Attend
) -> Tensor:
    """(R', D), (R, D) -> (R', D); the other heads give each token's own value."""
    (v,) = _project(w, product, 2, 3, h, None)
    o = v[: len(asking)].clone()
    for heads in pieces:
        (q,), (k,) = _project(w, product, 0, 1, asking, heads), _project(w, product, 1, 2, h, heads)
        o[:, heads] = attend(q, k, _choose(v, heads), heads).to(o.dtype)
    return product(o.flatten(1), w.out_weight.flatten(1), w.out_bias)


def _choose(x: Tensor, heads: Heads) -> Tensor:
    """Some heads of a tensor whose second axis they are: neighbours are a view, others a copy."""
    if heads is None:
        return x
    return x[:, heads] if isinstance(heads, slice) else x.index_select(1, heads)


def _project(w: Projections, product: Product, first: int, last: int, h: Tensor, heads: Heads) -> list[Tensor]:
    """(R, D) -> each of q (0), k (1) and v (2) from ``first`` to ``last`` (left out), (R, heads that are on, E)."""
    if len(w.qkv) == 1:
        parts = [(w.qkv[0][first:last], None if w.qkv_bias[0] is None else w.qkv_bias[0][first:last])]
    else:
        parts = list(zip(w.qkv[first:last], w.qkv_bias[first:last]))
    found: list[Tensor] = []
    for weight, bias in parts:
        weight = _choose(weight, heads)
        bias = None if bias is None else _choose(bias, heads).flatten()
        found += product(h, weight.flatten(0, 2), bias).view(len(h), *weight.shape[:3]).unbind(1)
    return found


def _attend(
    w: Projections,
    keys: int,
    scale: float | None,
    bias: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Heads,
) -> Tensor:
    """Three of (R, heads, E) -> (R, heads, E)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (w.norms[0](q), w.norms[1](k[:keys]), v[:keys]))
    bias = None if bias is None else _choose(bias, heads)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)[0].transpose(0, 1)
