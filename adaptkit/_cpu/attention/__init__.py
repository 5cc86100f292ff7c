"""Softmax attention with the gradient of `kernel.c`, once that has been compiled and has passed a test.

The forward pass is torch's flash attention for the CPU, to the bit. Its backward pass asks the BLAS for many small
products; one kernel for all of them, compiled for this processor, takes two thirds of the time.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from adaptkit.ops import build
from adaptkit.ops.forks import Lock
from adaptkit.seam import twice, without_autocast

__all__ = ["attention", "is_supported"]

SOURCE = Path(__file__).with_name("kernel.c")
FLAGS = ("-ffp-contract=fast",)  # no branch depends on a rounding here
# In units of the largest number. Rounding gives 2e-6 with SSE, AVX2 and AVX-512 alike; a constant of exp that is off by
# 2e-4 gives 1.1e-5.
_TOLERANCE = 8e-6

_lock = Lock()


def is_supported(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch would run its flash attention, and the kernel knows its gradient: float32 (B, H, N, D), one D.

    The first call of a process compiles or loads the kernel.
    """
    for x in (q, k, v):
        if type(x) is not Tensor or x.device.type != "cpu" or x.dtype != torch.float32 or x.ndim != 4:
            return False
        if x.numel() == 0 or x.stride(3) != 1 or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
    same = k.shape == v.shape and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    choice = getattr(torch, "_fused_sdp_choice", None)
    if not same or choice is None or choice(q, k, v) != SDPBackend.FLASH_ATTENTION.value:
        return False
    with _lock:
        return _library() is not None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """``F.scaled_dot_product_attention(q, k, v, scale=scale)`` of what ``is_supported``."""
    return _Attention.apply(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


def _formula(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return (scale * q @ k.mT).softmax(-1) @ v


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, 0.0, False, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # its gradient is to have one
            return twice(_formula, (q, k, v, ctx.scale), grad)
        library = _library()
        assert library is not None  # else there was no forward
        return *_gradients(library, grad, q, k, v, out, lse, ctx.scale), None


class _Heads(ctypes.Structure):
    """The kernel's Heads."""

    _fields_ = (("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("image", "head", "row")))

    @staticmethod
    def of(x: Tensor) -> _Heads:
        return _Heads(x.data_ptr(), *x.stride()[:3])


class _AttentionCall(ctypes.Structure):
    """The kernel's Call."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "heads", "queries", "keys", "dim", "threads")),
        ("scale", ctypes.c_float),
        *((name, _Heads) for name in ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v")),
        ("lse", ctypes.c_void_p),
    )


def _gradients(
    library: ctypes.CDLL, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; ``lse`` (B, H, N) is the logarithm of the sum that softmax divides by."""
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad, lse = grad if grad.stride(3) == 1 else grad.contiguous(), lse.contiguous()
    threads = min(torch.get_num_threads(), q.shape[0] * q.shape[1])
    sizes = (*q.shape[:3], k.shape[2], q.shape[3], threads)
    call = _AttentionCall(*sizes, scale, *map(_Heads.of, (q, k, v, out, grad, *grads)), lse.data_ptr())
    memory = q.new_empty(threads * library.scratch(ctypes.byref(call)))
    library.backward(ctypes.byref(call), ctypes.c_void_p(memory.data_ptr()))
    return grads


@cache
def _library() -> ctypes.CDLL | None:
    """The kernel, or None where it cannot be compiled or is wrong: torch's own gradient serves then."""
    try:
        library = build.load(SOURCE, {}, {"scratch": ctypes.c_int64, "backward": None}, FLAGS)
    except build.BuildError as error:
        build.warn_slow(str(error))
        return None
    error_of = _self_test(library)
    if not error_of <= _TOLERANCE:
        build.warn_slow(f"the compiled kernel of attention is off by {error_of:.1e} in its self-test")
        return None
    return library


@torch.no_grad()
def _self_test(library: ctypes.CDLL) -> float:
    """Return the largest error, relative to the largest number, against the formula in float64: all code paths.

    Without autograd: the first call may come from inside a checkpoint, whose hooks would run this again.
    """
    generator, errors = torch.Generator().manual_seed(0), []
    for queries, keys, dim in ((5, 70, 20), (103, 66, 64), (97, 3, 80)):
        scale = 1.5 * dim**-0.5
        given_q, given_k, given_v, given_grad = given = [
            torch.randn(2, n, 3, dim, generator=generator, dtype=torch.float32, device="cpu").transpose(1, 2)
            for n in (queries, keys, keys, queries)
        ]
        q, k, v, grad = (x.double() for x in given)
        logits = scale * q @ k.mT
        p = logits.softmax(-1)
        out, ds = p @ v, scale * p * (grad @ v.mT - (grad * (p @ v)).sum(-1, keepdim=True))
        made = out.float(), logits.logsumexp(-1).float()
        found = _gradients(library, given_grad, given_q, given_k, given_v, *made, scale)
        expected = ds @ k, ds.mT @ q, p.mT @ grad
        errors += [(a - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(errors).max())  # NaN if one is
