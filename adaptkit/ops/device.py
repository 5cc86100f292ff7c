"""The one place that decides where the quick ways of a CPU are taken.

On a CPU fresh memory costs more than most arithmetic, so that much is made some rows or one image at a time and made
again in the backward pass. A GPU wants the opposite: few operators, whatever the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaptkit.ops.grid import pair, pairs
from adaptkit.seam import is_reference, reference

__all__ = ["eager_cpu", "pair", "pairs", "reference"]


def eager_cpu(x: Tensor) -> bool:
    """Whether ``x`` lies on a CPU and operators run one by one: the quick ways are for that alone.

    A GPU, ``torch.compile`` and ``torch.export`` get plain operators.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_reference()
