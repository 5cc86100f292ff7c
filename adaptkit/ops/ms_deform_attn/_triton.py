"""The CUDA backend: one program per some bags, a bag being one head of one query, its rows read by cells and hats.

Both pixels of a cell exist on either axis, so no load is guarded but for channels beyond D; a program needs four rows a
point. Gradients of points and weights are dot products with those rows, stored by the one program that has them. The
gradient of the values is added up by atomics, in whatever order: the last bits differ from run to run.
"""

import logging
import os
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptkit.ops.ms_deform_attn import _bag
from adaptkit.ops.ms_deform_attn._plain import compute_dtype

_TOLERANCE = 1e-5
_log = logging.getLogger(__name__)


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on tensors of the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(value: Tensor, weights: Tensor) -> str | None:
    """Return why this backend cannot run a call, or None. The first call on a device tests the kernels there."""
    if value.device.type != "cuda" and not interpreted():
        return f"it runs on CUDA, and value is on {value.device}"
    return _failure(value.device)


def forward(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int]) -> Tensor:
    """(N, Q, H * D), in the dtype of ``value``."""
    batch, _, heads, dim = value.shape
    value, locations, weights = (tensor.contiguous() for tensor in (value, locations, weights))
    out = value.new_empty((batch, locations.shape[1], heads * dim))
    grid, constants = _launch(value, weights, elements=1024)
    _forward_kernel[grid](value, locations, weights, out, _levels(tuple(shapes), value.device), **constants)
    return out


def backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``value``, ``locations`` and ``weights``."""
    grad, value, locations, weights = (tensor.contiguous() for tensor in (grad, value, locations, weights))
    grad_value = torch.zeros_like(value, dtype=compute_dtype(value))
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    grid, constants = _launch(value, weights, elements=512)
    _backward_kernel[grid](
        grad, value, locations, weights, grad_value, grad_locations, grad_weights,
        _levels(tuple(shapes), value.device), **constants,
    )  # fmt: skip
    return grad_value.to(value.dtype), grad_locations, grad_weights


def _launch(value: Tensor, weights: Tensor, elements: int) -> tuple[tuple[int], dict[str, object]]:
    """The number of programs, and what they are compiled for: each has bags of about so many channels in all."""
    pixels, heads, dim = value.shape[1:]
    channels = triton.next_power_of_2(dim)
    block = max(1, elements // channels)
    bags = weights.shape[:3].numel()
    real = tl.float64 if compute_dtype(value) == torch.float64 else tl.float32
    sizes = {"BAGS": bags, "QUERIES": weights.shape[1], "PIXELS": pixels}
    constants = {
        "H": heads,
        "D": dim,
        "L": weights.shape[3],
        "P": weights.shape[4],
        "BLOCK": block,
        "CHANNELS": channels,
    }
    return (triton.cdiv(bags, block),), {**sizes, **constants, "REAL": real}


@lru_cache(maxsize=256)
def _levels(shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """(L, 3) height, width and first pixel of each level, written on the device: a copy from the host would wait."""
    rows = torch.empty(len(shapes) // 2, 3, dtype=torch.int32, device=device)
    start = 0
    for row, h, w in zip(rows, shapes[::2], shapes[1::2], strict=True):
        for place, number in zip(row, (h, w, start)):
            place.fill_(number)
        start += h * w
    return rows


# -------- kernels


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
def _forward_kernel(
    value, locations, weights, out, levels, BAGS, QUERIES, PIXELS, H: tl.constexpr, D: tl.constexpr,
    L: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = bag < BAGS
    channel = tl.arange(0, CHANNELS)
    mask = there[:, None] & (channel < D)[None, :]
    table = value + ((bag // H // QUERIES) * PIXELS * H + bag % H)[:, None] * D + channel[None, :]
    total = tl.zeros((BLOCK, CHANNELS), dtype=REAL)
    for level in range(L):
        h = tl.load(levels + level * 3)
        w = tl.load(levels + level * 3 + 1)
        first = tl.load(levels + level * 3 + 2)
        right = tl.where(w > 1, H * D, 0)
        below = tl.where(h > 1, w * H * D, 0)
        for p in tl.static_range(P):
            point = (bag * L + level) * P + p
            x, _, left, right_hat = _axis(tl.load(locations + 2 * point, there, 0.0), w, REAL)
            y, _, above, below_hat = _axis(tl.load(locations + 2 * point + 1, there, 0.0), h, REAL)
            weight = tl.load(weights + point, there, 0.0).to(REAL)
            corner = table + ((first + y * w + x).to(tl.int64) * (H * D))[:, None]
            above, below_hat = above * weight, below_hat * weight
            total += (above * left)[:, None] * tl.load(corner, mask, 0.0).to(REAL)
            total += (above * right_hat)[:, None] * tl.load(corner + right, mask, 0.0).to(REAL)
            total += (below_hat * left)[:, None] * tl.load(corner + below, mask, 0.0).to(REAL)
            total += (below_hat * right_hat)[:, None] * tl.load(corner + below + right, mask, 0.0).to(REAL)
    tl.store(out + bag[:, None] * D + channel[None, :], total.to(out.dtype.element_ty), mask)


@triton.jit
def _corner(table, grad_table, offset, weight, grad, mask, REAL: tl.constexpr):
    """The dot product of `grad` with a corner's row; `weight * grad` is added to the row's gradient."""
    tl.atomic_add(grad_table + offset, weight[:, None] * grad, mask & (weight != 0)[:, None], sem="relaxed")
    return tl.sum(grad * tl.load(table + offset, mask, 0.0).to(REAL), 1)


@triton.jit
def _backward_kernel(
    grad, value, locations, weights, grad_value, grad_locations, grad_weights, levels, BAGS, QUERIES, PIXELS,
    H: tl.constexpr, D: tl.constexpr, L: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = bag < BAGS
    channel = tl.arange(0, CHANNELS)
    mask = there[:, None] & (channel < D)[None, :]
    place = ((bag // H // QUERIES) * PIXELS * H + bag % H)[:, None] * D + channel[None, :]
    row = tl.load(grad + bag[:, None] * D + channel[None, :], mask, 0.0).to(REAL)
    for level in range(L):
        h = tl.load(levels + level * 3)
        w = tl.load(levels + level * 3 + 1)
        first = tl.load(levels + level * 3 + 2)
        right = tl.where(w > 1, H * D, 0)
        below = tl.where(h > 1, w * H * D, 0)
        for p in tl.static_range(P):
            point = (bag * L + level) * P + p
            x, rx, left, right_hat = _axis(tl.load(locations + 2 * point, there, 0.0), w, REAL)
            y, ry, above, below_hat = _axis(tl.load(locations + 2 * point + 1, there, 0.0), h, REAL)
            to_left, to_right = _slopes(rx, w)
            to_above, to_below = _slopes(ry, h)
            weight = tl.load(weights + point, there, 0.0).to(REAL)
            offset = place + ((first + y * w + x).to(tl.int64) * (H * D))[:, None]
            a = _corner(value, grad_value, offset, weight * above * left, row, mask, REAL)
            b = _corner(value, grad_value, offset + right, weight * above * right_hat, row, mask, REAL)
            c = _corner(value, grad_value, offset + below, weight * below_hat * left, row, mask, REAL)
            d = _corner(value, grad_value, offset + below + right, weight * below_hat * right_hat, row, mask, REAL)
            upper, lower = left * a + right_hat * b, left * c + right_hat * d
            along_x = above * (to_left * a + to_right * b) + below_hat * (to_left * c + to_right * d)
            along_y = to_above * upper + to_below * lower
            real = grad_locations.dtype.element_ty
            tl.store(grad_weights + point, (above * upper + below_hat * lower).to(grad_weights.dtype.element_ty), there)
            tl.store(grad_locations + 2 * point, (along_x * weight * w).to(real), there)
            tl.store(grad_locations + 2 * point + 1, (along_y * weight * h).to(real), there)


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
    results = [forward(*inputs, shapes), *backward(grad, *inputs, shapes)]
    expected = [_bag.forward(*inputs, shapes), *_bag.backward(grad, *inputs, shapes)]
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(results, expected, strict=True)]
    return float(torch.stack(errors).max())  # NaN if one is
