"""The gradient of frozen blocks, on a CPU by quicker means than torch's. The forward pass is its own, bit for bit.

What a frozen block costs in training is the gradient of its tokens. For a linear layer ``y = x W' + b`` it is
``grad W``, a product as large as that of the forward pass: the BLAS of most builds of torch needs half as long again
for it as oneDNN. For attention see ``adaptkit._cpu.attention``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adaptkit._cpu import attention
from adaptkit._cpu.linear import linear
from adaptkit.core.block import Block
from adaptkit.seam import fast_path, without_autocast

__all__ = ["frozen_block"]

_PLAIN = (Tensor, nn.Parameter)  # and no subclass, sharded or quantised
_NOT_PLAIN = ("attn_mask", "dropout_p", "is_causal", "enable_gqa")


def _wants_a_gradient(block: Block, x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


@fast_path(Block.__call__, is_supported=_wants_a_gradient)
def frozen_block(block: Block, x: Tensor) -> Tensor:
    """Run the backbone's own forward; frozen linear layers and attention have that gradient."""
    with _FrozenBlock():
        return block.run(x)


class _FrozenBlock(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not kwargs and len(args) in (2, 3) and _is_frozen_linear(*args):
            return _frozen_linear(*args)
        if func is F.scaled_dot_product_attention:
            return _attention(func, *args, **kwargs)
        return func(*args, **kwargs)


def _attention(func: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    plain = not args and not any(kwargs.get(option) for option in _NOT_PLAIN[1:]) and kwargs.get(_NOT_PLAIN[0]) is None
    if plain and any(x.requires_grad for x in (q, k, v)) and attention.is_supported(q, k, v):
        return attention.attention(q, k, v, kwargs.get("scale"))
    return func(q, k, v, *args, **kwargs)


def _is_frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    if not x.requires_grad or x.dtype != torch.float32 or type(x) is not Tensor:
        return False
    return all(
        type(t) in _PLAIN and not t.requires_grad and t.dtype == torch.float32 for t in (weight, bias) if t is not None
    )


def _frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., in) -> (..., out). The rows are laid out first: what a Function returns as a view bears no ``+=``."""
    if x.ndim <= 2:
        return _FrozenLinear.apply(x, weight, bias)
    return _FrozenLinear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


class _FrozenLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[override]
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return linear(grad, weight.t()), None, None
