"""Quantised linear layers in full precision again, whatever library packed their weights.

Libraries pack weights in ways of their own and change these. But a linear layer says its weight itself: its row for
the unit vector e_j is column j, ``W e_j = W[:, j]``. That it is linear is proved on random vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adaptkit.core.tensors import is_packed
from adaptkit.core.tree import skeleton

__all__ = ["packs_its_weight", "unpacked"]

ROWS = 1024  #: unit vectors at once
TOLERANCE = 0.05  #: of a random vector's output, as a share: layers in 8 bits round what comes in too


def packs_its_weight(layer: nn.Module) -> bool:
    """Whether it is a linear layer that keeps its weight in fewer bits."""
    weight = layer._parameters.get("weight")
    if weight is None or not hasattr(layer, "in_features") or not hasattr(layer, "out_features"):
        return False
    return is_packed(weight)


@torch.no_grad()
def unpacked(packed: Any, dtype: torch.dtype, where: str) -> nn.Linear:
    """Return a layer in float32 that computes what the packed one does on inputs of ``dtype``.

    Raises ``ValueError`` with ``where`` it lies if it is not linear.
    """
    made = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None, device="meta")
    made._parameters["bias"] = packed.bias
    layer = skeleton(packed).eval()
    layer._parameters["bias"] = None
    device = packed.weight.device
    columns = torch.empty(made.in_features, made.out_features)
    if not columns.is_meta and device.type != "meta":  # where a file is planned, tensors are made without values
        columns = columns.to(device)
        vectors = torch.zeros(min(ROWS, made.in_features), made.in_features, device=device, dtype=dtype)
        for start in range(0, made.in_features, len(vectors)):
            some = vectors.zero_()[: made.in_features - start]
            some.diagonal(start).fill_(1)
            columns[start : start + len(some)] = layer(some).float()
        generator = torch.Generator("cpu").manual_seed(0)
        x = torch.randn(8, made.in_features, generator=generator, device="cpu").to(device, dtype)
        wanted, found = layer(x).float(), x.float() @ columns
        if not float((found - wanted).norm()) <= TOLERANCE * float(wanted.norm()):
            raise ValueError(
                f"{where}: what a {type(packed).__name__} says is not linear, so that no copy of it can be trained: "
                "attach to the backbone before it is quantised"
            )
    made._parameters["weight"] = nn.Parameter(columns.T.contiguous())
    return made
