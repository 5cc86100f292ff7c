"""Whether packing a batch to a capacity is faster than masking it, as measured on the device at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from adaptkit.adapters.adavit.capacity import EVERYTHING, Capacity
from adaptkit.ops.timing import seconds
from adaptkit.seam import is_timeable, product_dtype

__all__ = ["Gain", "gain"]

Sizes = tuple[torch.device, torch.dtype, tuple[int, ...]]


class Gain(NamedTuple):
    """Times of one block, in seconds: a packed one takes ``fixed + share * whole``."""

    masked: float
    fixed: float
    whole: float

    def is_profitable(self, share: float) -> bool:
        """Whether packing is faster where this share of the work is left; 0: whether it ever is."""
        return self.fixed + share * self.whole < self.masked


NEVER = Gain(0.0, 0.0, 0.0)

_measured: dict[Sizes, Gain] = {}


def gain(x: Tensor, masked: Callable[[], Tensor], packed: Callable[[Capacity], Tensor]) -> Gain:
    """Return what packing gains on tokens like x (B, T, D); runs both ways some times at the first such question."""
    sizes = x.device, product_dtype(x), tuple(x.shape)
    if sizes not in _measured:
        if not is_timeable(x):
            return NEVER
        _measured[sizes] = _measure(masked, packed)
    return _measured[sizes]


def _measure(masked: Callable[[], Tensor], packed: Callable[[Capacity], Tensor]) -> Gain:
    half = Capacity(EVERYTHING.images, EVERYTHING.tokens // 2, EVERYTHING.rows // 2)
    all_of_it, half_of_it = seconds(lambda: packed(EVERYTHING)), seconds(lambda: packed(half))
    whole = max(0.0, (all_of_it - half_of_it) / (1.0 - half.share))
    return Gain(seconds(masked), all_of_it - whole, whole)
