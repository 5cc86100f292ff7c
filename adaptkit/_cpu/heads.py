"""Attention image by image, each with the weights of the heads that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit._cpu.packed_attention import attention, index
from adaptkit.core.block import Projections

__all__ = ["PLAIN", "Products", "by_image"]

Heads: TypeAlias = list[int] | slice | None  #: places of heads that are on, or neighbours; None: all
Attend = Callable[[list[Tensor], Heads], Tensor]


class Products(NamedTuple):
    """How rows (R, D) are multiplied."""

    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]  #: x, weight (D', D), bias (D',) -> (R, D')
    #: x, weight (n, heads, E, D), bias (n, heads, E), places -> (R, n, these heads, E). None: neighbours alone
    of_heads: Callable[[Tensor, Tensor, Tensor | None, list[int]], Tensor] | None = None
    whole: bool = False  #: whether the output projection is never cut: heads that are off are zeros before it


PLAIN = Products(F.linear)


def by_image(
    w: Projections,
    rows: Sequence[Tensor],
    on: Sequence[list[float] | None],
    biases: Sequence[Tensor] | None,
    scale: float | None,
    head_mode: str,
    queries: int | None,
    keys: Sequence[int],
    products: Products,
) -> Tensor:
    """Normed rows (R, D) of each image -> their updates before LayerScale, end to end.

    Args:
        w: the backbone's weights.
        rows: of each image.
        on: which heads are on, not zero, in each image; None: all.
        biases: on the logits of each image, (1, all heads, R, R).
        scale: of the logits; None is ``1/sqrt(E)``.
        head_mode: what an off head gives, nothing (``"full"``) or each token's own value (``"partial"``).
        queries: how many of the first rows of each image ask; None: all. The others give keys and values alone.
        keys: how many of the first rows of each image are attended to.
        products: how rows are multiplied.
    """
    outs = []
    for i, (h, image_on) in enumerate(zip(rows, on)):
        bias = None if biases is None else biases[i][:, :, :queries, : keys[i]]
        attend = partial(_attend, w, keys[i], scale, bias)
        asking = h if queries is None else h[:queries]
        if image_on is None or all(image_on):
            outs.append(_joined(w, products, asking, h, [None], attend))
            continue
        places = [j for j, keep in enumerate(image_on) if keep]
        if head_mode == "partial" or (products.whole and places):
            outs.append(_scattered(w, products, asking, h, places, head_mode, attend))
        else:
            outs.append(_joined(w, products, asking, h, _groups(places, products), attend))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _groups(places: list[int], products: Products) -> list[Heads]:
    """Heads that are on, as they are multiplied: together, or in stretches of neighbours, whose weights are views."""
    if products.of_heads is not None:
        return [places] if places else []
    starts, ends = [j for j in places if j - 1 not in places], [j + 1 for j in places if j + 1 not in places]
    return [slice(*pair) for pair in zip(starts, ends)]


def _joined(
    w: Projections, products: Products, asking: Tensor, h: Tensor, groups: list[Heads], attend: Attend
) -> Tensor:
    """(R', D), (R, D) -> (R', D): what groups of heads add up to."""
    out = h.new_zeros(len(w.out_weight)) if w.out_bias is None else w.out_bias
    for heads in groups:
        o = attend(_qkv(w, products, asking, h, heads), heads).flatten(1)
        weight = _choose(w.out_weight, heads).flatten(1)
        out = torch.addmm(out, o, weight.t()) if isinstance(heads, slice) else products.linear(o, weight, w.out_bias)
    return out if out.ndim == 2 else out.expand(len(asking), -1)


def _scattered(
    w: Projections, products: Products, asking: Tensor, h: Tensor, places: list[int], head_mode: str, attend: Attend
) -> Tensor:
    """(R', D), (R, D) -> (R', D): some heads among zeros, or among each token's own values, before one product."""
    values = _project(w, products, 2, 3, h, None)[0] if head_mode == "partial" else None
    o = h.new_zeros(len(asking), *w.out_weight.shape[1:]) if values is None else values[: len(asking), 0].clone()
    if places:
        parts = [_qkv(w, products, asking, h, heads, values) for heads in _groups(places, products)]
        joined = parts[0] if len(parts) == 1 else [torch.cat(same, 2) for same in zip(*parts)]
        o.index_copy_(1, index(places), attend(joined, places).to(o.dtype))
    return products.linear(o.flatten(1), w.out_weight.flatten(1), w.out_bias)


def _qkv(
    w: Projections, products: Products, asking: Tensor, h: Tensor, heads: Heads, values: Tensor | None = None
) -> list[Tensor]:
    """(R', D), (R, D) -> q (R', 1, heads, E), k and v of these heads, or several of them together on the second axis.

    ``values`` (R, 1, all heads, E) are those of all heads where they are known.
    """
    last = 3 if values is None else 2
    if asking is h and not isinstance(heads, slice):
        found = _project(w, products, 0, last, h, heads)
    else:
        found = [y for j in range(last) for y in _project(w, products, j, j + 1, h if j else asking, heads)]
    return found if values is None else [*found, _choose(values, heads, 2)]


def _choose(x: Tensor, heads: Heads, axis: int = 1) -> Tensor:
    """Some heads of a tensor that has them on this axis: neighbours are a view, others a copy."""
    if heads is None:
        return x
    if isinstance(heads, slice):
        return x.narrow(axis, heads.start, heads.stop - heads.start)
    return x.index_select(axis, index(heads))


def _project(w: Projections, products: Products, first: int, last: int, h: Tensor, heads: Heads) -> list[Tensor]:
    """(R, D) -> q (0), k (1) and v (2) from ``first`` to ``last`` (left out), (R, as many, heads that are on, E).

    One tensor where they are one layer of the backbone, else one of each.
    """
    if len(w.qkv) == 1:
        whole = last - first == len(w.qkv[0])
        bias = None if w.qkv_bias[0] is None else w.qkv_bias[0] if whole else w.qkv_bias[0][first:last]
        parts = [(w.qkv[0] if whole else w.qkv[0][first:last], bias)]
    else:
        parts = list(zip(w.qkv[first:last], w.qkv_bias[first:last]))
    found: list[Tensor] = []
    for weight, bias in parts:
        if isinstance(heads, list) and products.of_heads is not None:
            found.append(products.of_heads(h, weight, bias, heads))
            continue
        weight, bias = _choose(weight, heads), None if bias is None else _choose(bias, heads).flatten()
        found.append(products.linear(h, weight.flatten(0, 2), bias).view(len(h), *weight.shape[:3]))
    return found


def _attend(
    w: Projections,
    keys: int,
    scale: float | None,
    bias: Tensor | None,
    qkv: list[Tensor],
    heads: Heads,
) -> Tensor:
    """What ``_qkv`` returns -> (R', heads, E)."""
    q, k, v = (x for several in qkv for x in several.unbind(1))
    q, k, v = (x.transpose(0, 1)[None] for x in (w.norms[0](q), w.norms[1](k[:keys]), v[:keys]))
    bias = None if bias is None else _choose(bias, heads)
    return attention(q, k, v, scale, bias)[0].transpose(0, 1)
