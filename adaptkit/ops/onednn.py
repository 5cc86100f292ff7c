"""Products of some hundred rows with frozen float32 weights, on a CPU in oneDNN's own tensors.

``F.linear`` hands float32 to the BLAS that torch was built with, on x86 MKL. A tensor that is ``to_mkldnn()`` goes to
oneDNN, which uses the widest registers of every processor: 15 to 20 % less time on some hundred rows. (For thousands of
rows see :mod:`adaptkit.ops.linear`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["avoided", "linear", "mlp", "rounded", "usable"]

LARGE = 2**18  # numbers in a weight, from which on the product outweighs the way there and back
PLAIN = (Tensor, nn.Parameter)  # and no subclass, sharded or quantised

_avoided: ContextVar[bool] = ContextVar("avoided", default=False)


@contextmanager
def avoided() -> Iterator[None]:
    """Inside, no product goes there and no row is added: for who counts."""
    token = _avoided.set(True)
    try:
        yield
    finally:
        _avoided.reset(token)


def usable(x: Tensor) -> bool:
    """Whether products of ``x`` may go there: it keeps no gradient here, and knows float32 alone."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    here = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled  # type: ignore[attr-defined]
    return here and not _avoided.get() and not torch.compiler.is_compiling()


def rounded(rows: int) -> int:
    """Return how many rows to ask for where ``rows`` are wanted, at most 6 % more: sixteen numbers in each octave.

    oneDNN compiles code for each number of rows that it meets, in two milliseconds, and keeps the last thousand.
    """
    step = 1 << max(0, rows.bit_length() - 5)
    return -(-rows // step) * step


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of rows (R, D) that are ``usable``."""
    return F.linear(x.to_mkldnn(), weight, bias).to_dense() if _pays(weight) else F.linear(x, weight, bias)


def mlp(x: Tensor, fc1: nn.Linear, act: Callable[[Tensor], Tensor], fc2: nn.Linear) -> Tensor:
    """``fc2(act(fc1(x)))`` of rows (R, D) that are ``usable``."""
    if not (_pays(fc1.weight) and _pays(fc2.weight)):
        return fc2(act(fc1(x)))
    hidden = F.linear(x.to_mkldnn(), fc1.weight, fc1.bias)
    exact = isinstance(act, nn.GELU) and act.approximate == "none"
    hidden = F.gelu(hidden) if exact else act(hidden.to_dense()).to_mkldnn()
    return F.linear(hidden, fc2.weight, fc2.bias).to_dense()


def _pays(weight: Tensor) -> bool:
    plain = type(weight) in PLAIN and weight.dtype == torch.float32 and weight.is_contiguous()
    return plain and weight.numel() >= LARGE
