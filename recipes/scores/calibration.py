"""Does a model know how sure it may be? The expected calibration error (Guo et al. 2017, eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def calibration_sums(confidence: Tensor, right: Tensor) -> Tensor:
    """Confidences in 0..1 and whether each was right -> (3, BINS): how many, their sum, how many right."""
    confidence, right = confidence.flatten().double(), right.flatten().double()
    place = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    sums = torch.zeros(3, BINS, dtype=torch.float64, device=confidence.device)
    for row, values in zip(sums, (torch.ones_like(confidence), confidence, right)):
        row.scatter_add_(0, place, values)
    return sums


def ece(sums: Tensor) -> Tensor:
    """(..., 3, BINS) -> (...,): the mean over bins of |accuracy - confidence|, weighted by how many fall in each."""
    _, confidence, right = sums.unbind(-2)
    return (right - confidence).abs().sum(-1) / sums[..., 0, :].sum(-1)
