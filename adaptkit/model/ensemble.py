"""Several sets of adapters on one backbone, and the mean of what they say.

    y = sum_i w_i y_i,    sum_i w_i = 1

y_i is what set i gives alone: logits before the softmax (so probabilities are averaged geometrically), pyramid maps,
tokens and prefix tokens. Each set has a pass of its own, for it may change what the blocks compute. A set of weight 0
has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptkit.core.view import Features

__all__ = ["averaged", "shares_of"]


def shares_of(names: Sequence[str], weights: Sequence[float] | None) -> dict[str, float]:
    """Names and weights -> the share of each in the mean; equal ones without weights.

    Raises ``ValueError`` for none or twice the same name, another number of weights, and weights that are no shares.
    """
    try:
        given = [1.0] * len(names) if weights is None else [float(w) for w in weights]
    except (TypeError, ValueError) as error:
        raise ValueError(f"weights={weights!r}: give a number of 0 or more for each set") from error
    if not names or len(set(names)) < len(names):
        raise ValueError(f"an ensemble of {list(names)}: give the names of sets, each once")
    if len(given) != len(names):
        raise ValueError(f"{len(given)} weights for {len(names)} sets ({', '.join(names)}): give one for each")
    if not all(0 <= w < math.inf for w in given) or not 0 < sum(given) < math.inf:
        raise ValueError(f"weights={given}: give numbers of 0 or more, not all 0, whose sum is finite")
    return {name: w / sum(given) for name, w in zip(names, given)}


def averaged(shares: Mapping[str, float], alone: Callable[[str], Features]) -> Features:
    """Run each set, and return the mean; what sets report in ``aux`` goes under ``<set>.<name>``.

    Maps are left out where some sets make none, or others. Raises ``ValueError`` where logits have other shapes, and
    ``TypeError`` where they are no tensor: objects that queries found have no common order.
    """
    names = [name for name, share in shares.items() if share]
    found = [alone(name) for name in names]
    weights, first = [shares[name] for name in names], found[0]
    if len(found) == 1:
        return first
    if not _equal([one.prefix.shape for one in found]):
        said = ", ".join(f"{name!r} {one.prefix.shape[1]}" for name, one in zip(names, found))
        raise ValueError(f"these sets give different numbers of prefix tokens ({said}): attach them with one prefix=")
    shapes = [[m.shape for m in one.maps] for one in found]
    maps = tuple(_mean(m, weights) for m in zip(*(one.maps for one in found))) if _equal(shapes) else ()
    aux = {f"{name}.{key}": value for name, one in zip(names, found) for key, value in one.aux.items()}
    return first._replace(
        tokens=_mean([one.tokens for one in found], weights),
        prefix=_mean([one.prefix for one in found], weights),
        maps=maps,
        logits=_logits({name: one.logits for name, one in zip(names, found)}, weights),
        aux=aux,
        intermediates=(),
    )


def _logits(found: Mapping[str, Any], weights: Sequence[float]) -> Tensor | None:
    if all(one is None for one in found.values()):
        return None
    other = next((name for name, one in found.items() if not isinstance(one, Tensor)), None)
    if other is not None:
        raise TypeError(
            f"the set {other!r} gives {type(found[other]).__name__}, and only tensors of logits are averaged: make "
            "such sets active one at a time"
        )
    if not _equal([one.shape for one in found.values()]):
        said = ", ".join(f"{name!r} {tuple(one.shape)}" for name, one in found.items())
        raise ValueError(f"these sets give logits of other shapes ({said}): average sets whose heads have one task")
    return _mean(list(found.values()), weights)


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([w * x for w, x in zip(weights, tensors)]).sum(0)


def _equal(values: Sequence[Any]) -> bool:
    return all(one == values[0] for one in values)
