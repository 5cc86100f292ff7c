"""The C backend: `kernel.c` by way of ctypes, once it has been compiled and has passed a test."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from adaptkit.ops import build, pool
from adaptkit.ops.forks import Lock
from adaptkit.ops.ms_deform_attn import _bag
from adaptkit.ops.ms_deform_attn._plain import compute_dtype

SOURCE = Path(__file__).with_name("kernel.c")
_BLOCK = 512  # the kernel's BLOCK: the points of one query and head have to fit in
_FUNCTIONS = dict.fromkeys(("forward", "backward_points", "backward_value"))
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}

_lock = Lock()


class _Call(ctypes.Structure):
    """The kernel's Call."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "pixels", "heads", "dim")),
        *((name, ctypes.c_int64) for name in ("queries", "levels", "points", "threads")),
        ("shapes", ctypes.POINTER(ctypes.c_int64)),
    ]


def why_not(value: Tensor, weights: Tensor) -> str | None:
    """Return why this backend cannot run a call, or None. The first call of a process compiles or loads the kernel."""
    if value.device.type != "cpu":
        return f"it runs on the CPU, and value is on {value.device}"
    points = weights.shape[3] * weights.shape[4]
    if points > _BLOCK:
        return f"L * P = {points} points of a query, and it takes up to {_BLOCK}"
    if value.shape[1] > torch.iinfo(torch.int32).max:
        return f"S = {value.shape[1]} pixels, and it counts them with 32 bits"
    with _lock:
        return _library(compute_dtype(value))[1]


def forward(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int]) -> Tensor:
    """(N, Q, H * D), in the dtype of ``value``."""
    batch, _, heads, dim = value.shape
    inputs = _dense(value, locations, weights)
    out = pool.empty((batch, locations.shape[1], heads * dim), inputs[0].dtype)
    _run("forward", inputs, shapes, (*inputs, out))
    return out.to(value.dtype)


def backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``value``, ``locations`` and ``weights``."""
    inputs = _dense(value, locations, weights)
    grad = grad.to(inputs[0].dtype).contiguous()
    grads = [torch.empty_like(tensor) for tensor in inputs]
    _run("backward_points", inputs, shapes, (*inputs, grad, *grads[1:]))
    _run("backward_value", inputs, shapes, (*inputs[1:], grad, grads[0]))
    return grads[0].to(value.dtype), grads[1].to(locations.dtype), grads[2].to(weights.dtype)


def _dense(value: Tensor, locations: Tensor, weights: Tensor) -> list[Tensor]:
    return [tensor.to(compute_dtype(value)).contiguous() for tensor in (value, locations, weights)]


def _run(name: str, inputs: list[Tensor], shapes: list[int], arguments: tuple[Tensor, ...]) -> None:
    library, _ = _library(inputs[0].dtype)
    _call(library, name, inputs, shapes, arguments)


def _call(library, name: str, inputs: list[Tensor], shapes: list[int], arguments: tuple[Tensor, ...]) -> None:
    value, _, weights = inputs
    _, queries, _, levels, points = weights.shape
    sides = (ctypes.c_int64 * len(shapes))(*shapes)
    call = _Call(*value.shape, queries, levels, points, torch.get_num_threads(), sides)
    getattr(library, name)(ctypes.byref(call), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in arguments))


# -------- compile, load, test


@cache
def _library(dtype: torch.dtype) -> tuple[ctypes.CDLL | None, str | None]:
    """The kernel for float32 or float64, or the reason why there is none."""
    try:
        library = build.load(SOURCE, {"REAL": "double" if dtype == torch.float64 else "float"}, _FUNCTIONS)
    except build.BuildError as error:
        build.warn_slow(str(error))
        return None, str(error)
    error_of = _self_test(library, dtype)
    if not error_of <= _TOLERANCE[dtype]:
        reason = f"the compiled kernel of ms_deform_attn is off by {error_of:.1e} in its self-test"
        build.warn_slow(reason)
        return None, reason
    return library, None


def _self_test(library, dtype: torch.dtype) -> float:
    """Return the largest error, relative to the largest number, against embedding_bag in float64: all code paths."""
    generator, errors = torch.Generator().manual_seed(0), []
    shapes = [6, 5, 1, 4, 3, 1, 1, 1]
    for dim in (5, 16, 32, 64):
        sizes = (2, 38, 2, dim), (2, 9, 2, 4, 2, 2), (2, 9, 2, 4, 2), (2, 9, 2 * dim)
        random = [torch.rand(n, generator=generator, dtype=torch.float64, device="cpu") for n in sizes]
        random[1] = random[1] * 1.5 - 0.25  # some points lie outside
        *inputs, grad = [tensor.to(dtype) for tensor in random]
        results = [torch.empty_like(grad), *map(torch.empty_like, inputs)]
        out, grad_value, *grad_points = results
        _call(library, "forward", inputs, shapes, (*inputs, out))
        _call(library, "backward_points", inputs, shapes, (*inputs, grad, *grad_points))
        _call(library, "backward_value", inputs, shapes, (*inputs[1:], grad, grad_value))
        value, locations, weights = [tensor.double() for tensor in inputs]
        expected = [
            _bag.forward(value, locations, weights, shapes),
            *_bag.backward(grad.double(), value, locations, weights, shapes),
        ]
        errors += [(a - b).abs().max() / b.abs().max() for a, b in zip(results, expected, strict=True)]
    return float(torch.stack(errors).max())  # NaN if one is
