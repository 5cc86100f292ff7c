"""One custom operator for all fast backends: `torch.compile` sees a single node, whichever of them runs inside.

Its gradient is an operator as well. What comes after that, the second derivative and all others, is that of the
"gather" form, in which autograd sees every step.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from adaptkit import seam
from adaptkit.ops.ms_deform_attn import _backends
from adaptkit.ops.ms_deform_attn._plain import compute_dtype, gather


def _check(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], grad: Tensor | None = None) -> None:
    """Raise ``ValueError`` unless the tensors fit together: kernels read memory by these sizes and look no further."""
    if value.ndim != 4 or locations.ndim != 6:
        raise ValueError(
            f"value has shape {tuple(value.shape)} and locations {tuple(locations.shape)}, expected (N, S, H, D) and "
            "(N, Q, H, L, P, 2); call adaptkit.ops.ms_deform_attn, which says what each axis is"
        )
    batch, pixels, heads, dim = value.shape
    whole = len(shapes) % 2 == 0 and all(side > 0 for side in shapes)
    if not whole or pixels != sum(h * w for h, w in zip(shapes[::2], shapes[1::2], strict=True)):
        raise ValueError(f"value has S={pixels} pixels, shapes are {list(shapes)}; give h, w of each level of value")
    points = (batch, locations.shape[1], heads, len(shapes) // 2, locations.shape[4])
    expected = {
        "value": (value, tuple(value.shape)),
        "locations": (locations, (*points, 2)),
        "weights": (weights, points),
    }
    if grad is not None:
        expected["grad"] = (grad, (batch, locations.shape[1], heads * dim))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}; expand it before")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} holds {tensor.dtype}, expected floating-point numbers; convert it before")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}; move them to one device")


def _check_countable(value: Tensor, shapes: list[int]) -> None:
    """Raise ``ValueError`` where a coordinate cannot tell the pixels of a row or column apart.

    Not asked of the fake tensors of a compiler, whose sizes would then have a bound.
    """
    if compute_dtype(value) == torch.float32 and max(shapes) > 2**24:
        raise ValueError(
            f"a level has {max(shapes)} pixels in a row or column, and a coordinate in float32 counts up to {2**24}; "
            "give value in float64, or cut the level"
        )


def _refuse_tangents() -> None:
    """Raise ``RuntimeError`` in forward mode: torch drops the tangent of a custom operator, and reads it as zero."""
    raise RuntimeError(
        "the fast backends of ms_deform_attn have no forward-mode derivative; use backend='gather', which has one and "
        "is what backend='auto' takes there"
    )


@torch.library.custom_op(
    "adaptkit::ms_deform_attn",
    mutates_args=(),
    schema="(Tensor value, Tensor locations, Tensor weights, SymInt[] shapes, str backend) -> Tensor",
)
def operator(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], backend: str) -> Tensor:
    """Like the public function, with broadcast points and the levels' h, w one after another."""
    _check(value, locations, weights, shapes)
    _check_countable(value, shapes)
    if forward_ad._current_level >= 0:
        _refuse_tangents()
    if value.numel() == 0 or weights.numel() == 0:
        return value.new_zeros((value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]))
    return _backends.implementation(backend, value, weights).forward(value, locations, weights, shapes)


@operator.register_fake
def _(value, locations, weights, shapes, backend):
    _check(value, locations, weights, shapes)
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
    _check(value, locations, weights, shapes, grad)
    _check_countable(value, shapes)
    if value.numel() == 0 or weights.numel() == 0:
        value, locations, weights = (tensor.new_zeros(tensor.shape) for tensor in (value, locations, weights))
        return value, locations, weights
    return _backends.implementation(backend, value, weights).backward(grad, value, locations, weights, shapes)


@operator_backward.register_fake
def _(grad, value, locations, weights, shapes, backend):
    _check(value, locations, weights, shapes, grad)
    return tuple(tensor.new_empty(tensor.shape) for tensor in (value, locations, weights))


def _save_inputs(ctx, inputs, output):
    *tensors, ctx.shapes, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(t).tangent is not None for t in (grad, *ctx.saved_tensors)
    ):
        _refuse_tangents()
    return *operator_backward(grad, *ctx.saved_tensors, ctx.shapes, ctx.backend), None, None


def _save_for_second(ctx, inputs, output):
    *tensors, ctx.shapes, _ = inputs
    ctx.save_for_backward(*tensors)


def _second(ctx, *grads):
    sides = ctx.shapes
    levels = list(zip(sides[::2], sides[1::2], strict=True))

    def first(grad, *inputs):
        """Do what `operator_backward` does, in steps that autograd can follow."""
        leaves = [x if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        value, locations, weights = leaves
        return torch.autograd.grad(gather(value, levels, locations, weights), leaves, grad, create_graph=True)

    return *seam.twice(first, ctx.saved_tensors, *grads), None, None


operator.register_autograd(_backward, setup_context=_save_inputs)
operator_backward.register_autograd(_second, setup_context=_save_for_second)
