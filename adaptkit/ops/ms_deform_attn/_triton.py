"""The CUDA backend: two Triton kernels, which read by cells and hats.

A program of the forward kernel has some bags, a bag being one head of one query, and adds up the rows of their points.
A program of the backward kernel has some points. Their gradients and those of their weights are dot products with the
same rows, stored by the one program that has the point. The gradient of the values is added up by atomics, in float32
and in whatever order: the last bits differ from run to run.

Both pixels of a cell exist on either axis, so no load is guarded but for channels beyond D. A thread reads up to 16
bytes of a row at once. The sizes of the levels are arguments of the kernels: a call copies nothing from the host, and
images of another size compile nothing anew.
"""

import logging
import os
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptkit.ops.forks import Lock
from adaptkit.ops.ms_deform_attn import _bag
from adaptkit.ops.ms_deform_attn._plain import compute_dtype

_TOLERANCE = 1e-5
_WIDEST = 16  # bytes that a thread loads at once
_SMALL = 2**30  # numbers in a tensor that 32 bits count, those of the last program's idle threads too
_log = logging.getLogger(__name__)
_tuning = Lock()  # triton.autotune keeps the arguments of a call in an attribute

# Channels and warps of a program. What is fastest is measured at the first call with these head sizes and dtypes.
CONFIGS = [
    triton.Config({"ELEMENTS": elements}, num_warps=warps)
    for elements, warps in ((512, 4), (256, 2), (1024, 8), (512, 2), (1024, 4))
]


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on tensors of the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(value: Tensor, weights: Tensor) -> str | None:
    """Return why this backend cannot run a call, or None. The first call on a device tests the kernels there."""
    if value.device.type != "cuda" and not interpreted():
        return f"it runs on CUDA, and value is on {value.device}"
    return _failure(value.device)


def forward(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], config: triton.Config | None = None
) -> Tensor:
    """(N, Q, H * D), in the dtype of ``value``; in the fastest configuration, or the one that is given."""
    batch, _, heads, dim = value.shape
    value, locations, weights = map(_ready, (value, locations, weights))
    out = value.new_empty((batch, locations.shape[1], heads * dim))
    bags = weights.shape[:3].numel()
    _launch(_forward_kernel, bags, (value, locations, weights, out), value, weights, shapes, config)
    return out


def backward(
    grad: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: list[int],
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``value``, ``locations`` and ``weights``."""
    grad, value, locations, weights = map(_ready, (grad, value, locations, weights))
    grad_value = torch.zeros_like(value, dtype=compute_dtype(value))
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    tensors = (grad, value, locations, weights, grad_value, grad_locations, grad_weights)
    _launch(_backward_kernel, weights.numel(), tensors, value, weights, shapes, config)
    return grad_value.to(value.dtype), grad_locations, grad_weights


# -------- launch


def _ready(tensor: Tensor) -> Tensor:
    """The tensor contiguous and at an address that wide loads can take, copied if it is not."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _WIDEST else tensor


def _launch(
    kernel: Any,
    rows: int,
    tensors: tuple[Tensor, ...],
    value: Tensor,
    weights: Tensor,
    shapes: list[int],
    config: triton.Config | None,
) -> None:
    """Run a kernel with a row of the value table for each of so many bags or points."""
    pixels, heads, dim = value.shape[1:]
    bags, channels = weights.shape[:3].numel(), triton.next_power_of_2(dim)
    constants = {
        "H": heads,
        "D": dim,
        "L": weights.shape[3],
        "P": weights.shape[4],
        "CHANNELS": channels,
        "REAL": tl.float64 if compute_dtype(value) == torch.float64 else tl.float32,
        # An offset of 64 bits takes two registers.
        "INDEX": tl.int32 if max(value.numel(), bags * dim, 2 * weights.numel()) < _SMALL else tl.int64,
    }
    # Triton compiles anew for numbers in a tuple that are 1 or that 16 divides: these never are.
    sides = tuple(2 * side + 1 for side in shapes)
    arguments = (*tensors, sides, bags, weights.shape[1], pixels)

    def grid(chosen: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(rows, max(1, chosen["ELEMENTS"] // channels)),)

    if config is None and interpreted():
        config = CONFIGS[0]
    with torch.cuda.device_of(value):
        if config is not None:
            kernel.fn[grid](*arguments, **constants, **config.all_kwargs())
            return
        with _tuning:
            kernel[grid](*arguments, **constants)


def configs_for(value: Tensor) -> list[triton.Config]:
    """The configurations to choose from: a thread loads a row's numbers at once, for two loads take more registers."""
    size = value.element_size()
    return [c for c in CONFIGS if c.kwargs["ELEMENTS"] * size <= 32 * c.num_warps * _WIDEST] or CONFIGS[:1]


def _prune(configs: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
    fitting = configs_for(arguments["value"])
    return fitting[:1] if torch.cuda.is_current_stream_capturing() else fitting


def _milliseconds(call: Any, quantiles: Any) -> Any:
    """What a configuration takes. Nothing can be timed in a graph that is being captured: there the first is taken."""
    if torch.cuda.is_current_stream_capturing():
        return [0.0] * len(quantiles)
    return triton.testing.do_bench(call, warmup=10, rep=40, quantiles=quantiles)


def _tuned(kernel: Any) -> Any:
    """Choose the fastest configuration at the first call of its kind, and remember it in Triton's cache on disk."""
    choose = triton.autotune(
        configs=CONFIGS,
        key=["D", "L", "P"],  # and the dtypes of all tensors, which Triton adds
        prune_configs_by={"early_config_prune": _prune},
        reset_to_zero=["grad_value"] if "grad_value" in kernel.arg_names else [],
        do_bench=_milliseconds,
        cache_results=True,
    )
    return choose(kernel)


# -------- kernels

_SIZES = ["bags", "queries", "pixels"]  # that differ from call to call: one kernel is compiled for all


@triton.jit
def _hat(r, top):
    """max(0, top - |r|), letting NaN through."""
    height = top - tl.abs(r)
    return tl.where(height < 0, 0.0, height)


@triton.jit
def _axis(location, size, REAL: tl.constexpr):
    """Cell, r, and the hats of its two pixels, along one axis of a level."""
    x = location.to(REAL) * size - 0.5
    last = tl.maximum(size - 2, 0).to(REAL)
    cell = tl.floor(x)
    cell = tl.where(cell > 0, cell, 0.0)  # NaN too
    cell = tl.where(cell < last, cell, last)
    r = x - cell
    second = tl.where(size > 1, 1.0, 0.0).to(REAL)
    return cell.to(tl.int32), r, _hat(r, 1.0), _hat(r - 1, second)


@triton.jit
def _slopes(r, size):
    """The derivative to the right of r of the hats of a cell's two pixels."""
    before = tl.where((r >= -1) & (r < 0), 1.0, 0.0).to(r.dtype)
    inside = tl.where((r >= 0) & (r < 1), 1.0, 0.0).to(r.dtype)
    after = tl.where((r >= 1) & (r < 2), 1.0, 0.0).to(r.dtype)
    return before - inside, tl.where(size > 1, inside - after, 0.0)


@triton.jit
def _level(sides, level, L: tl.constexpr):
    """Height, width and first pixel of a level, or of the level of each point; ``sides`` as `_launch` packs them."""
    h, w = sides[0] >> 1, sides[1] >> 1
    first, start = 0, h * w
    for i in tl.static_range(1, L):
        level_h, level_w = sides[2 * i] >> 1, sides[2 * i + 1] >> 1
        h = tl.where(level == i, level_h, h)
        w = tl.where(level == i, level_w, w)
        first = tl.where(level == i, start, first)
        start += level_h * level_w
    return h, w, first


@triton.jit
def _row(rows, channel, D: tl.constexpr, REAL: tl.constexpr):
    """(rows, channels) the numbers of a row from the address of its first; zeros beyond D."""
    if channel.shape[1] == D:
        return tl.load(rows[:, None] + channel).to(REAL)
    else:
        return tl.load(rows[:, None] + channel, channel < D, 0.0).to(REAL)


@_tuned
@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    value, locations, weights, out, sides, bags, queries, pixels, H: tl.constexpr, D: tl.constexpr,
    L: tl.constexpr, P: tl.constexpr, CHANNELS: tl.constexpr, ELEMENTS: tl.constexpr, REAL: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = ELEMENTS // CHANNELS if ELEMENTS > CHANNELS else 1
    place = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    there = place < bags
    bag = tl.where(there, place, 0)
    channel = tl.arange(0, CHANNELS)[None, :]
    table = (bag // H // queries) * pixels * H + bag % H
    total = tl.zeros((BLOCK, CHANNELS), dtype=REAL)
    for level in range(L):
        h, w, first = _level(sides, level, L)
        right = (w > 1).to(tl.int32) * (H * D)  # products: the compiler sees what divides them, and loads wide
        below = (h > 1).to(tl.int32) * w * (H * D)
        for p in tl.range(P, loop_unroll_factor=4):
            point = (bag * L + level) * P + p
            x, _, left, right_hat = _axis(tl.load(locations + 2 * point), w, REAL)
            y, _, above, below_hat = _axis(tl.load(locations + 2 * point + 1), h, REAL)
            weight = tl.load(weights + point).to(REAL)
            above, below_hat = above * weight, below_hat * weight
            corner = value + (table + (first + y * w + x).to(INDEX) * H) * D
            total += (above * left)[:, None] * _row(corner, channel, D, REAL)
            total += (above * right_hat)[:, None] * _row(corner + right, channel, D, REAL)
            total += (below_hat * left)[:, None] * _row(corner + below, channel, D, REAL)
            total += (below_hat * right_hat)[:, None] * _row(corner + below + right, channel, D, REAL)
    rows = out + place * D
    tl.store(rows[:, None] + channel, total.to(out.dtype.element_ty), there[:, None] & (channel < D))


@triton.jit
def _add(rows, channel, weight, grad, D: tl.constexpr):
    tl.atomic_add(
        rows[:, None] + channel, weight[:, None] * grad, (weight != 0)[:, None] & (channel < D), sem="relaxed"
    )


@_tuned
@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    grad, value, locations, weights, grad_value, grad_locations, grad_weights, sides, bags, queries, pixels,
    H: tl.constexpr, D: tl.constexpr, L: tl.constexpr, P: tl.constexpr, CHANNELS: tl.constexpr,
    ELEMENTS: tl.constexpr, REAL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = ELEMENTS // CHANNELS if ELEMENTS > CHANNELS else 1
    place = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    there = place < bags * (L * P)
    point = tl.where(there, place, 0)
    bag = point // (L * P)
    channel = tl.arange(0, CHANNELS)[None, :]
    h, w, first = _level(sides, point // P % L, L)
    x, rx, left, right_hat = _axis(tl.load(locations + 2 * point), w, REAL)
    y, ry, above, below_hat = _axis(tl.load(locations + 2 * point + 1), h, REAL)
    weight = tl.load(weights + point, there, 0.0).to(REAL)

    table = (bag // H // queries) * pixels * H + bag % H
    first_corner = (table + (first + y * w + x).to(INDEX) * H) * D
    right = first_corner + (w > 1).to(tl.int32) * (H * D)
    below = (h > 1).to(tl.int32) * w * (H * D)
    row = _row(grad + bag * D, channel, D, REAL)
    # All rows are asked for before the first is used, and added to after that: no load waits for an atomic.
    a = tl.sum(row * _row(value + first_corner, channel, D, REAL), 1)
    b = tl.sum(row * _row(value + right, channel, D, REAL), 1)
    c = tl.sum(row * _row(value + first_corner + below, channel, D, REAL), 1)
    d = tl.sum(row * _row(value + right + below, channel, D, REAL), 1)

    _add(grad_value + first_corner, channel, weight * above * left, row, D)
    _add(grad_value + right, channel, weight * above * right_hat, row, D)
    _add(grad_value + first_corner + below, channel, weight * below_hat * left, row, D)
    _add(grad_value + right + below, channel, weight * below_hat * right_hat, row, D)

    to_left, to_right = _slopes(rx, w)
    to_above, to_below = _slopes(ry, h)
    upper, lower = left * a + right_hat * b, left * c + right_hat * d
    along_x = above * (to_left * a + to_right * b) + below_hat * (to_left * c + to_right * d)
    along_y = to_above * upper + to_below * lower
    tl.store(grad_weights + place, (above * upper + below_hat * lower).to(grad_weights.dtype.element_ty), there)
    tl.store(grad_locations + 2 * place, (along_x * weight * w).to(grad_locations.dtype.element_ty), there)
    tl.store(grad_locations + 2 * place + 1, (along_y * weight * h).to(grad_locations.dtype.element_ty), there)


# -------- test


@cache
def _failure(device: torch.device) -> str | None:
    """Why the kernels do not run, or run wrongly, on this device; None if they do."""
    try:
        error_of = _self_test(device)
    except Exception as error:  # whatever a compiler or a driver may raise
        reason = f"the kernels do not run on {device}: {type(error).__name__}: {error}"
    else:
        if error_of <= _TOLERANCE:
            return None
        reason = f"the kernels are off by {error_of:.1e} in their self-test on {device}"
    _log.warning("ms_deform_attn does without Triton: %s", reason)
    return reason


def _self_test(device: torch.device) -> float:
    """Return the largest error, relative to the largest number, against embedding_bag."""
    shapes, generator = [6, 5, 1, 4, 1, 1], torch.Generator().manual_seed(0)
    sizes = (1, 35, 2, 20), (1, 9, 2, 3, 2, 2), (1, 9, 2, 3, 2), (1, 9, 40)
    value, locations, weights, grad = [
        torch.rand(n, generator=generator, dtype=torch.float32, device="cpu").to(device) for n in sizes
    ]
    inputs = value, locations * 1.5 - 0.25, weights
    expected = [_bag.forward(*inputs, shapes), *_bag.backward(grad, *inputs, shapes)]
    errors = []
    for config in configs_for(value):
        results = [forward(*inputs, shapes, config), *backward(grad, *inputs, shapes, config)]
        errors += [(a - b).abs().max() / b.abs().max() for a, b in zip(results, expected, strict=True)]
    return float(torch.stack(errors).max())  # NaN if one is
