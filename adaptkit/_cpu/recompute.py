"""Recomputation: tensors that are cheap to compute again need not be kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["recomputed"]


@contextmanager
def recomputed(*made: tuple[Tensor, Callable[[], Tensor]]) -> Iterator[None]:
    """Keep, in place of each tensor y, how to compute it again: pairs (y, again), ``again()`` equal to y.

    Operations inside the block that would hold y, or a view of it, until the backward pass call ``again`` then. What
    ``again`` needs should be kept anyway, as the input of a LayerNorm is by the LayerNorm. In nested blocks the inner
    one alone acts.
    """
    if not torch.is_grad_enabled():
        yield
        return
    known = {y.data_ptr(): _Recomputed(y, again) for y, again in made if y.requires_grad}

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        found = known.get(tensor.data_ptr())
        return found.instead_of(tensor) if found and found.is_like(tensor) else tensor

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        known.clear()  # autograd holds `pack`


class _Recomputed:
    """How to compute a tensor again: once for all who ask."""

    def __init__(self, y: Tensor, again: Callable[[], Tensor]) -> None:
        self.numel, self.dtype, self.again = y.numel(), y.dtype, again
        self.askers, self.asked = 0, 0
        self.found: Tensor | None = None

    def is_like(self, tensor: Tensor) -> bool:
        """Whether it is all of y, maybe in another shape."""
        return tensor.numel() == self.numel and tensor.dtype == self.dtype

    def instead_of(self, tensor: Tensor) -> Callable[[], Tensor]:
        """What is kept for the backward pass."""
        self.askers += 1
        size, stride = tensor.shape, tensor.stride()
        return lambda: self.value().as_strided(size, stride)

    def value(self) -> Tensor:
        """Return y; the last one who asks drops it."""
        if self.found is None:
            with torch.autocast("cpu", enabled=False):  # as the forward pass ran
                self.found = self.again()
        found, self.asked = self.found, (self.asked + 1) % self.askers
        if self.asked == 0:
            self.found = None
        return found
