"""Memory for large results that is used again once nobody holds the last one.

The C library gives back to the system what is larger than 32 MiB as soon as it is freed, and the system clears each
page that a process touches for the first time: of a map of 50 MB this takes longer than the product that fills it. A
GPU's allocator keeps such memory; this does so on a CPU, for as few results as were alive at once.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["empty", "held", "release"]

LARGE = 2**24  # bytes from which on memory is kept
MOST = 2**29  # bytes that are kept at most
ALIGNMENT = 64  # as torch's own memory

_lock = threading.Lock()
_buffers: list[bytearray] = []


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.empty(shape, dtype=dtype)`` on the CPU. What is large may lie where an earlier result lay.

    A tensor refers to its memory, and so do its views and arrays made of it: memory is free when none of them is left.
    """
    numbers = math.prod(shape)
    size = numbers * dtype.itemsize
    if not LARGE <= size <= MOST:
        return torch.empty(shape, dtype=dtype)
    with _lock:
        buffer = _take(size + ALIGNMENT)
        start = -torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() % ALIGNMENT
        return torch.frombuffer(buffer, dtype=dtype, count=numbers, offset=start).view(tuple(shape))


def held() -> int:
    """Bytes that are kept, in use or free."""
    return sum(map(len, _buffers))


def release() -> None:
    """Let go of all memory that is free; what is in use is freed with its last tensor."""
    with _lock:
        _buffers.clear()


def _take(size: int) -> bytearray:
    """Return a free buffer of this size, or up to twice as large; else a new one, and let go of all that are free."""
    free = [_references(_buffers, i) == _UNUSED for i in range(len(_buffers))]
    for buffer, is_free in zip(_buffers, free):
        if is_free and size <= len(buffer) <= 2 * size:
            return buffer
    _buffers[:] = [buffer for buffer, is_free in zip(_buffers, free) if not is_free]
    new = bytearray(size)
    if held() + size <= MOST:
        _buffers.append(new)
    return new


def _references(buffers: list[bytearray], i: int) -> int:
    return sys.getrefcount(buffers[i])


_UNUSED = _references([bytearray()], 0)
