"""Whether a view says what its backbone computes: proven on a few random tokens, for a class name proves nothing.

A subclass may add positions of its own, a block may hide another attention, a method may have been replaced on one
object. So both are run and compared, on a copy of the tree that shares the weights: the user's modules, modes, hooks
and random numbers are left alone.

1. *The forward*, at the sizes that the backbone takes. Each block is replaced by a cheap function of its own that also
   depends on the arguments it gets, so that embedding, positions, order of the blocks and final norm run as its
   class has them, and the whole costs little more than the embedding.
2. *The blocks*, on a grid of a few tokens: one of each kind, ``run`` against the parts.

Small parameters are perturbed in the copy, for a bias of zero or a tiny LayerScale would hide what is added or scaled.
Half precision is computed in float32.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack

import torch
from torch import Tensor

from adaptkit.core.tensors import stands_in
from adaptkit.core.view import View
from adaptkit.model.proof.blocks import prove_blocks
from adaptkit.model.proof.forward import prove_forward

__all__ = ["prove"]


@torch.no_grad()
def prove(view: View) -> None:
    """Compare a view with the backbone it sees. Nothing is changed, but for ``view.splits``.

    An attention whose inside is not what the view says sets ``view.splits`` to ``False``: adapters that step inside it
    are then refused by name, and the others, which run the backbone's own blocks, attach.

    What cannot be computed here is passed over: the meta device, fake tensors, sharded parameters.

    Raises ``TypeError`` that names what differs, by how much, and what to do.
    """
    parameters = list(view.backbone.parameters())
    if not parameters or any(map(_is_out_of_reach, parameters)):
        return
    devices = {p.device for p in parameters if p.device.type != "cpu"}
    with ExitStack() as stack:
        for kind in {d.type for d in devices} or {"cuda"}:
            own = [d for d in devices if d.type == kind]
            stack.enter_context(torch.random.fork_rng(own, device_type=kind))
        for kind in {p.device.type for p in parameters}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        prove_blocks(view)
        prove_forward(view)


def _is_out_of_reach(p: Tensor) -> bool:
    return p.is_meta or stands_in(p)
