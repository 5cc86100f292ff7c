"""One custom operator for all fast backends: `torch.compile` sees a single node, whichever of them runs inside."""

import torch
from torch import Tensor

from adaptkit.ops.ms_deform_attn import _backends


@torch.library.custom_op(
    "adaptkit::ms_deform_attn",
    mutates_args=(),
    schema="(Tensor value, Tensor locations, Tensor weights, SymInt[] shapes, str backend) -> Tensor",
)
def operator(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], backend: str) -> Tensor:
    """Like the public function, with broadcast points and the levels' h, w one after another."""
    if value.numel() == 0 or weights.numel() == 0:
        return value.new_zeros((value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]))
    return _backends.implementation(backend, value, weights).forward(value, locations, weights, shapes)


@operator.register_fake
def _(value, locations, weights, shapes, backend):
    batch, _, heads, dim = value.shape
    return value.new_empty((batch, locations.shape[1], heads * dim))


@torch.library.custom_op(
    "adaptkit::ms_deform_attn_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor value, Tensor locations, Tensor weights, SymInt[] shapes, str backend) "
    "-> (Tensor, Tensor, Tensor)",
)
def operator_backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``value``, ``locations`` and ``weights``."""
    if value.numel() == 0 or weights.numel() == 0:
        value, locations, weights = (tensor.new_zeros(tensor.shape) for tensor in (value, locations, weights))
        return value, locations, weights
    return _backends.implementation(backend, value, weights).backward(grad, value, locations, weights, shapes)


@operator_backward.register_fake
def _(grad, value, locations, weights, shapes, backend):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (value, locations, weights))


def _save_inputs(ctx, inputs, output):
    *tensors, ctx.shapes, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return *operator_backward(grad, *ctx.saved_tensors, ctx.shapes, ctx.backend), None, None


def _backward_twice(ctx, *grads):
    raise RuntimeError(
        f"ms_deform_attn with backend={ctx.backend!r} is differentiable once and this backward asks for a second "
        "derivative; use backend='gather'"
    )


def _save_backend(ctx, inputs, output):
    ctx.backend = inputs[-1]


operator.register_autograd(_backward, setup_context=_save_inputs)
operator_backward.register_autograd(_backward_twice, setup_context=_save_backend)
