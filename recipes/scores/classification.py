"""Image classification: top-1, top-5, accuracy by class, the confusion matrix, calibration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bootstrap import interval
from .calibration import calibration_sums, ece, reliability
from .segmentation import listed


class ClassificationScores:
    """Adds up batches. Tensors stay where they are until the end, so that a batch need not wait for the one before."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.right: list[Tensor] = []  #: (B, 2), whether the class is the first, and among the first five
        self.pairs: list[Tensor] = []  #: (B, 2), true and predicted class
        self.confidence: list[Tensor] = []  #: (B, 2), probabilities of the predicted and of the true class

    def update(self, scores: Tensor, labels: Tensor, shares: Tensor | None = None) -> None:
        """Add images: logits (B, K) and their classes (B,); or anything of their order, with the probabilities."""
        shares = scores.softmax(-1) if shares is None else shares
        first = scores.sort(dim=-1, descending=True, stable=True).indices[:, :5]
        hits = first == labels[:, None]
        self.right.append(torch.stack([hits[:, 0], hits.any(1)], 1).double())
        self.pairs.append(torch.stack([labels, first[:, 0]], 1))
        self.confidence.append(shares.gather(1, torch.stack([first[:, 0], labels], 1)))

    def compute(self) -> dict[str, float]:
        """Return top-1 and top-5, in 0..1."""
        top1, top5 = torch.cat(self.right).mean(0).tolist()
        return {"top1": top1, "top5": top5}

    def details(self) -> dict[str, Any]:
        """Return the means, and what a report shows beside them."""
        right, pairs = torch.cat(self.right).cpu(), torch.cat(self.pairs).cpu()
        sure = torch.cat(self.confidence).cpu()
        bins = calibration_sums(sure[:, 0], right[:, 0])
        places = pairs[:, 0] * self.classes + pairs[:, 1]
        confusion = torch.bincount(places, minlength=self.classes**2).view(self.classes, self.classes)
        return {
            **self.compute(),
            "images": len(right),
            "per_class": listed(confusion.diagonal().double() / confusion.sum(1)),
            "count": confusion.sum(1).tolist(),
            "confusion": confusion.tolist(),
            "ece": float(ece(bins)),
            "calibration": reliability(bins),
            "interval": {"top1": list(interval(right[:, :1], lambda sums: sums[:, 0] / len(right)))},
            "per_image": right[:, 0].tolist(),
            "per_image_confidence": sure[:, 1].tolist(),  # of the true class
        }
