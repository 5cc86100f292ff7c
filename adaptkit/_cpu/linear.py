"""A linear layer and what stands before or after it, without the wide tensors in between.

On a CPU fresh memory costs more than most arithmetic: a page is cleared when it is first touched. What is wide is
therefore made a few rows at a time, or where the result goes anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.ops import pool
from adaptkit.seam import twice, without_autocast

__all__ = ["add_linear", "branch_linear", "linear", "norm_linear", "row_slices", "wide_linear"]

NUMBERS = 2**21  # of rows that are made at a time: they stay in the cache from one operation to the next


def row_slices(rows: int, step: int) -> Iterator[slice]:
    """Yield slices of ``step`` rows."""
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: (..., D) -> (..., D').

    A float32 product is written as the 1x1 convolution that it is: oneDNN, which torch asks for convolutions, uses the
    widest registers of every processor, and the BLAS of most builds of torch does so on some alone.
    """
    if not torch.backends.mkldnn.is_available() or x.dtype != torch.float32 or x.numel() == 0:
        return F.linear(x, weight, bias)
    rows = x.reshape(1, -1, 1, x.shape[-1]).movedim(3, 1)  # channels-last: nothing is moved
    return F.conv2d(rows, weight[:, :, None, None], bias).movedim(1, 3).reshape(*x.shape[:-1], -1)


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear`` of (..., D) to a width that makes it large; without gradients in memory of an earlier such result."""
    if torch.is_grad_enabled():
        return linear(x, weight, bias)
    out = pool.empty((*x.shape[:-1], len(weight)), x.dtype)
    rows, into = x.reshape(-1, x.shape[-1]), out.view(-1, len(weight))
    for s in row_slices(len(rows), NUMBERS // len(weight) + 1):
        into[s] = linear(rows[s], weight, bias)
    return out


def norm_linear(x: Tensor, norm: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(norm(x), weight, bias)``: (..., D) -> (..., D').

    Rows that a LayerNorm made are made again in the backward pass, and never held as a whole; other norms just run.
    """
    return branch_linear(x, norm, weight, bias)[1]


def branch_linear(x: Tensor, norm: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x, norm_linear(x, ...)`` of a residual branch: the gradients of both are summed where the second is made."""
    if not isinstance(norm, nn.LayerNorm):
        return x, linear(norm(x), weight, bias)
    out, same = _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, weight, bias)
    return same if x.requires_grad and torch.is_grad_enabled() else x, out


def add_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x + linear(y, weight, bias)``: x (..., D), y (..., D')."""
    return _AddLinear.apply(x.flatten(0, -2), y.flatten(0, -2), weight, bias).view_as(x)


def _norm_linear(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The text of ``_NormLinear``."""
    return F.linear(F.layer_norm(x, gamma.shape, gamma, beta, eps), weight, bias), x


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, gamma, beta, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        rows = x.flatten(0, -2)
        out = weight.new_empty(len(rows), len(weight))
        for s in row_slices(len(rows), NUMBERS // rows.shape[1] + 1):
            out[s] = linear(F.layer_norm(rows[s], gamma.shape, gamma, beta, eps), weight, bias)
        return out.unflatten(0, x.shape[:-1]), x

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor | None, beside: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return beside, None, None, None, None, None
        x, gamma, beta, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return twice(_norm_linear, (x, gamma, beta, ctx.eps, weight, bias), grad, beside)
        of_x, of_gamma, of_beta, _, of_weight, of_bias = ctx.needs_input_grad
        behind = [of_x, of_gamma, of_beta]  # what lies behind the product
        shape, x, grad = x.shape, x.flatten(0, -2), grad.flatten(0, -2)
        beside = None if beside is None else beside.flatten(0, -2)
        grad_x = pool.empty_like(x) if of_x else None
        grad_gamma, grad_beta, grad_weight = (torch.zeros_like(t) for t in (gamma, beta, weight))
        for s in row_slices(len(x), NUMBERS // x.shape[1] + 1):
            normed, mean, rstd = torch.native_layer_norm(x[s], gamma.shape, gamma, beta, ctx.eps)
            if of_weight:
                grad_weight += grad[s].t() @ normed
            if any(behind):
                through = linear(grad[s], weight.t())
                to_norm = torch.ops.aten.native_layer_norm_backward
                found = to_norm(through, x[s], gamma.shape, mean, rstd, gamma, beta, behind)
                if grad_x is not None:
                    grad_x[s] = found[0] if beside is None else found[0].add_(beside[s])
                grad_gamma += found[1] if of_gamma else 0
                grad_beta += found[2] if of_beta else 0
        grad_x = None if grad_x is None else grad_x.view(shape)
        grads = (grad_x, grad_gamma, grad_beta, None, grad_weight, grad.sum(0) if of_bias else None)
        return tuple(g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad))


class _AddLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, weight)
        out = pool.empty_like(x)
        for s in row_slices(len(x), NUMBERS // x.shape[1] + 1):
            torch.add(x[s], linear(y[s], weight, bias), out=out[s])
        return out

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, weight = ctx.saved_tensors
        _, wants_y, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            grad,
            wide_linear(grad, weight.t(), None) if wants_y else None,
            grad.t() @ y if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )
