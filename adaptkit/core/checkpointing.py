"""Gradient checkpointing: a block keeps its input alone for the backward pass, which runs it a second time.

Memory falls from what every block keeps to what one keeps, for one more forward pass of the blocks. Values and
gradients are those without it, bit for bit where the kernels are deterministic, dropout and sampling included. The
backbone stays in eval mode, in which the layers of transformers ignore their own switch, and its blocks are wrapped by
adapters: so the view does it, around the wrapped block, and only where something in the pass is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import adaptkit.ops.ms_deform_attn  # noqa: F401  the operator whose output is kept
from adaptkit.core.proxy import rerouted
from adaptkit.seam import bound, records_gradients

__all__ = ["OFF", "Checkpointed", "Checkpointing", "recompute"]

Aux = dict[str, Tensor]  #: the aux outputs: what adapters report in one forward, by name
Run = Callable[[Tensor], Tensor]


class Checkpointing(NamedTuple):
    """Which blocks are run a second time, and how."""

    every: int = 1  #: each ``every``-th block, from the first on; 0: none
    options: Mapping[str, Any] = {}  #: of ``torch.utils.checkpoint.checkpoint``

    def of(self, index: int) -> bool:
        """Whether it is for block ``index``."""
        return self.every > 0 and index % self.every == 0


OFF = Checkpointing(0)


@dataclass(frozen=True, eq=False)
class Checkpointed:
    """A wrapped block that keeps its input alone.

    A block that runs twice must report twice what it reported first: it is built anew for each run, around aux
    outputs of its own that begin as the common ones were.
    """

    build: Callable[[Aux], Run]  #: returns the wrapped block, which reports to these
    aux: Aux  #: of the whole forward
    trained: bool  #: whether something is trained in the blocks, so that a gradient is wanted even if x wants none
    options: Mapping[str, Any]
    state: Sequence[tuple[object, str]] = ()  #: what its run reads of modules, see :func:`adaptkit.seam.bound`

    def __call__(self, x: Tensor) -> Tensor:
        """(B, P+N, D) -> (B, P+N, D)."""
        if not (self.trained or x.requires_grad):
            return self.build(self.aux)(x)
        run = rerouted(bound(partial(_run, self.build, dict(self.aux)), self.state))
        y, reported, dropped = checkpoint(run, x, use_reentrant=False, **self.options)
        self.aux.update(reported)
        for name in dropped:
            del self.aux[name]
        return y


def _run(build: Callable[[Aux], Run], before: Aux, x: Tensor) -> tuple[Tensor, Aux, list[str]]:
    """Run the block; return what it added to the aux outputs, and the names that it took out."""
    aux = dict(before)
    y = build(aux)(x)
    reported = {name: value for name, value in aux.items() if before.get(name) is not value}
    return y, reported, [name for name in before if name not in aux]


# ----------------------------------------------------------------------------------------------- one part of a forward

#: The output of an attention is kept: its time grows with the square of the tokens, its memory does not.
_KEPT = [
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.adaptkit.ms_deform_attn.default,
]


def recompute(state: Sequence[tuple[object, str]] | None, run: Callable[..., Tensor], *args: Any) -> Tensor:
    """Return ``run(*args)`` and keep the arguments alone for the backward pass, where gradients are wanted.

    What is cheap is computed again. A last linear layer is not: its gradient asks for its input, not its output. A
    block that is checkpointed keeps less than that already. ``state`` is what the run reads of modules, see
    :func:`adaptkit.seam.bound`; with None nothing is computed again.
    """
    if state is None or isinstance(run, Checkpointed) or not records_gradients():
        return run(*args)
    contexts = partial(create_selective_checkpoint_contexts, _KEPT)
    return checkpoint(rerouted(bound(run, state)), *args, use_reentrant=False, context_fn=contexts)
