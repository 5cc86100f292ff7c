"""Activation checkpointing that costs little time: what is cheap is computed again in the backward pass.

The output of an attention is kept, for its time grows with the square of the tokens and its memory does not. Where the
last operation of ``run`` is a linear layer it is not computed again: its gradient asks for its input, not its output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import adaptkit.ops.ms_deform_attn  # noqa: F401  the operator that is kept
from adaptkit.core.checkpointing import Checkpointed
from adaptkit.seam import bound

__all__ = ["recompute"]

_KEPT = [
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.adaptkit.ms_deform_attn.default,
]


def recompute(state: Sequence[tuple[object, str]] | None, run: Callable[..., Tensor], *args: Any) -> Tensor:
    """Return ``run(*args)`` and keep the arguments alone for the backward pass, where gradients are wanted.

    A block that is checkpointed keeps less than that already. ``state`` is what the run reads of modules, see
    :func:`adaptkit.seam.bound`; with None nothing is computed again.
    """
    if state is None or isinstance(run, Checkpointed) or not torch.is_grad_enabled():
        return run(*args)
    contexts = partial(create_selective_checkpoint_contexts, _KEPT)
    return checkpoint(bound(run, state), *args, use_reentrant=False, context_fn=contexts)
