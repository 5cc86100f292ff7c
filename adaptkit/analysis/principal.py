"""Principal components whose sign does not depend on the machine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Principal", "principal"]


class Principal(NamedTuple):
    """A basis: ``(x - mean) @ components.T``."""

    mean: Tensor  #: (D,)
    components: Tensor  #: (n, D), orthonormal, the most important first
    explained: Tensor  #: (n,) share of the variance that each explains

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., n)."""
        return (x.double() - self.mean) @ self.components.T


def principal(x: Tensor, count: int) -> Principal:
    """Return the first components of rows (N, D), in double precision.

    An eigenvector is one up to its sign: here its entry of the largest size is positive.
    """
    x = x.detach().double().cpu()
    mean = x.mean(0)
    _, values, rows = torch.linalg.svd(x - mean, full_matrices=False)
    rows = rows[:count]
    sign = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    variance = values**2
    return Principal(mean, rows * sign, variance[:count] / variance.sum().clamp_min(1e-300))
