"""``x W^T + b`` of frozen float32 weights on a CPU, by whichever of torch's two libraries is the faster one there.

``F.linear`` hands float32 to the BLAS that torch was built with, on x86 MKL. torch also carries oneDNN, which computes
the same sum and on some CPUs takes a fifth to a third less time. Which one wins is measured once in a process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

__all__ = ["exact_rows", "faster", "linear", "rounded"]

_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_PLAIN = (Tensor, nn.Parameter)  #: not those of another layout or library
_TRIALS = 7

_exact: ContextVar[bool] = ContextVar("exact", default=False)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """(..., R, D), (D', D), (D',) -> (..., R, D') as ``act(F.linear(...))``, which it is for an R not ``rounded``."""
    if type(weight) in _PLAIN and weight.dtype == torch.float32 and x.shape[-2] == _whole(x.shape[-2]) and faster(x):
        if isinstance(act, nn.GELU) and type(act) is nn.GELU and act.approximate == "none":
            fused: Tensor = _ONEDNN(x, weight, bias, "gelu", [], "none")
            return fused
        y = _onednn(x, weight, bias)
    else:
        y = F.linear(x, weight, bias)
    return y if act is None else act(y)


def rounded(rows: int, x: Tensor) -> int:
    """Return how many rows to compute where ``rows`` of tensors like ``x`` are wanted: more may take less time.

    oneDNN compiles code for each number of rows that it meets, which takes a millisecond, and keeps that of the last
    thousand. So it is asked for sixteen different numbers in each octave, at most 6 % too many.
    """
    return _whole(rows) if faster(x) else rows


@contextmanager
def exact_rows() -> Iterator[None]:
    """Inside, no row is added, and everything goes to ``F.linear``: for who counts."""
    token = _exact.set(True)
    try:
        yield
    finally:
        _exact.reset(token)


def _whole(rows: int) -> int:
    step = 1 << max(0, rows.bit_length() - 5)
    return -(-rows // step) * step


def faster(x: Tensor) -> bool:
    """Whether rows like these go to oneDNN, which records no gradient and knows no autocast."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or not x.numel():
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or _exact.get() or not torch.backends.mkldnn.enabled:
        return False
    return onednn_wins(torch.get_num_threads())


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = _ONEDNN(x, weight, bias, "none", [], "")
    return y


@cache
def onednn_wins(threads: int) -> bool:
    """Whether oneDNN agrees and takes less time, on one layer of a small ViT and some hundred rows: about 20 ms."""
    if _ONEDNN is None:
        return False
    # What follows a model operator by operator (a counter, a profiler of shapes) does so in its own thread.
    with ThreadPoolExecutor(1) as other:
        return other.submit(_trial).result()


def _trial() -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    sizes = (96, 384), (1536, 384), (1536,)
    x, weight, bias = (torch.randn(n, generator=generator, device="cpu", dtype=torch.float32) for n in sizes)
    if not torch.allclose(_onednn(x, weight, bias), F.linear(x, weight, bias), rtol=1e-4, atol=1e-3):
        return False
    taken: dict[Callable[..., Tensor], list[float]] = {_onednn: [], F.linear: []}
    for _ in range(_TRIALS):  # in turns, and the least of each: what else runs on the machine hits both
        for run, seconds in taken.items():
            started = time.perf_counter()
            run(x, weight, bias)
            seconds.append(time.perf_counter() - started)
    return min(taken[_onednn]) < min(taken[F.linear])


if _ONEDNN is not None:

    @register_flop_formula(_ONEDNN)
    def _flops(x: torch.Size, weight: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
        """Multiplications and additions, so that torch's counter sees this operator too."""
        return 2 * out_shape.numel() * weight[1]
