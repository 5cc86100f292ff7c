"""The one place that decides where the quick ways of a CPU are taken, and how a GPU gets numbers of the host.

On a CPU fresh memory costs more than most arithmetic, so that much is made some rows or one image at a time and made
again in the backward pass. A GPU wants the opposite: few operators, whatever the batch, and no waiting for the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptkit.seam import is_reference, reference

__all__ = ["eager_cpu", "pair", "pairs", "reference"]


def eager_cpu(x: Tensor) -> bool:
    """Whether ``x`` lies on a CPU and operators run one by one: the quick ways are for that alone.

    A GPU, ``torch.compile`` and ``torch.export`` get plain operators.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_reference()


def pair(first: float, second: float, like: Tensor) -> Tensor:
    """``like.new_tensor([first, second])``, (2,); on a GPU written there, for a copy from the host would wait."""
    if like.device.type == "cpu" and not is_reference():
        return like.new_tensor([first, second])
    return torch.stack([like.new_full((), first), like.new_full((), second)])


def pairs(values: Sequence[tuple[float, float]], like: Tensor) -> Tensor:
    """``like.new_tensor(values)``, (n, 2), written as `pair` does it."""
    if like.device.type == "cpu" and not is_reference():
        return like.new_tensor(values)
    return torch.stack([like.new_full((), number) for value in values for number in value]).unflatten(0, (-1, 2))
