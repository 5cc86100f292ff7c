"""Image classification: top-1, top-5, accuracy by class, the confusion matrix, calibration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bootstrap import interval
from .calibration import calibration_sums, ece
from .segmentation import listed


class ClassificationScores:
    """Adds up images one by one."""

    def __init__(self, classes: int) -> None:
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        self.right: list[Tensor] = []  #: of each image (2,), whether the class is the first, and among the first five
        self.bins: list[Tensor] = []

    def update(self, shares: Tensor, label: int) -> None:
        """Add one image: probabilities (K,) and its class."""
        order = shares.argsort(descending=True, stable=True)
        first = order[0] == label
        self.right.append(torch.stack([first, (order[:5] == label).any()]).double())
        self.bins.append(calibration_sums(shares[order[0]][None], first[None]))
        self.confusion[label, int(order[0])] += 1

    def details(self) -> dict[str, Any]:
        """Return the means in 0..1, and what a report shows beside them."""
        right = torch.stack(self.right)
        true = self.confusion.sum(1)
        top1, top5 = right.mean(0).tolist()
        return {
            "top1": top1,
            "top5": top5,
            "images": len(right),
            "per_class": listed(self.confusion.diagonal().double() / true),
            "confusion": self.confusion.tolist(),
            "ece": float(ece(torch.stack(self.bins).sum(0))),
            "interval": {"top1": list(interval(right[:, :1], lambda sums: sums[:, 0] / len(right)))},
            "per_image": right[:, 0].tolist(),
        }
