"""What a tensor is: numbers as torch keeps them, a weight in a packing of some library, or a stand-in."""

from __future__ import annotations

from torch import Tensor

__all__ = ["is_packed", "is_plain", "stands_in"]

#: A shard of a tensor, one without values, and one that a compiler watches. By name: their modules take time to import.
STAND_INS = ("DTensor", "FakeTensor", "FunctionalTensor")


def is_plain(tensor: Tensor) -> bool:
    """Whether it holds its numbers as they are, in half precision or more."""
    return type(tensor.data) is Tensor and tensor.is_floating_point() and tensor.dtype.itemsize > 1


def stands_in(tensor: Tensor) -> bool:
    """Whether it stands for another tensor, whose values are not here."""
    return type(tensor.data).__name__ in STAND_INS


def is_packed(tensor: Tensor) -> bool:
    """Whether its numbers are here but in fewer bits, in whatever packing."""
    return not (is_plain(tensor) or stands_in(tensor))
