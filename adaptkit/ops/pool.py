"""Memory for large results that is used again once nobody holds the last one.

The C library gives back to the system what is larger than 32 MiB as soon as it is freed, and the system clears each
page that a process touches for the first time: of a map of 50 MB this takes longer than the product that fills it. A
GPU's allocator keeps such memory; this does so on a CPU, for as few results as were alive at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from adaptkit.ops.forks import Lock

__all__ = ["empty", "empty_like", "held", "release"]

LARGE = 2**23  # bytes from which on memory is kept
MOST = 2**29  # bytes that are kept at most
ALIGNMENT = 64  # as torch's own memory

_lock = Lock()
_buffers: list[bytearray] = []
if sys.platform != "win32":  # in a fork, what the other threads held will never be free
    os.register_at_fork(after_in_child=_buffers.clear)


def empty(
    shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """``torch.empty`` on the CPU. What is large may lie where an earlier result lay.

    A tensor refers to its memory, and so do its views and arrays made of it: memory is free when none of them is left.
    """
    return empty_like(torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format), "cpu")


def empty_like(x: Tensor, device: torch.device | str | None = None) -> Tensor:
    """``torch.empty_like(x, device=device)``; on the CPU by ``empty``."""
    device, size = device or x.device, x.numel() * x.dtype.itemsize
    if torch.device(device).type != "cpu" or not LARGE <= size <= MOST:
        return torch.empty_like(x, device=device)
    stride = torch.empty_like(x, device="meta").stride()
    with _lock:
        buffer = _take(size + ALIGNMENT)
        start = -torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() % ALIGNMENT
        # Its part of the buffer alone, for `torch.save` writes the whole storage of a tensor.
        memory = torch.frombuffer(buffer, dtype=torch.uint8, count=size, offset=start).untyped_storage()
        # Not a view of another tensor: what comes out of an autograd function may then be changed in place.
        return torch.empty(0, dtype=x.dtype).set_(memory, 0, x.shape, stride)


def held() -> int:
    """Bytes that are kept, in use or free."""
    return sum(map(len, _buffers))


def release() -> None:
    """Let go of all memory that is free; what is in use is freed with its last tensor."""
    with _lock:
        _buffers.clear()


def _take(size: int) -> bytearray:
    """Return the smallest free buffer of one to four times this size; else a new one, and let go of what is free."""
    free = [_references(_buffers, i) == _UNUSED for i in range(len(_buffers))]
    fits = [buffer for buffer, is_free in zip(_buffers, free) if is_free and size <= len(buffer) <= 4 * size]
    if fits:
        return min(fits, key=len)
    _buffers[:] = [buffer for buffer, is_free in zip(_buffers, free) if not is_free]
    new = bytearray(size)
    if held() + size <= MOST:
        _buffers.append(new)
    return new


def _references(buffers: list[bytearray], i: int) -> int:
    return sys.getrefcount(buffers[i])


_UNUSED = _references([bytearray()], 0)
