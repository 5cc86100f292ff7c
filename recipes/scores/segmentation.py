"""Semantic segmentation: IoU and accuracy by class, boundary IoU, the confusion matrix."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bootstrap import interval
from .calibration import ece


def confusion(prediction: Tensor, target: Tensor, classes: int, ignore: int) -> Tensor:
    """Class ids of one image, any shape -> (classes, classes) int64: rows are true, columns predicted."""
    prediction, target = prediction.flatten().long(), target.flatten().long()
    known = (target != ignore) & (target >= 0) & (target < classes)
    place = torch.where(known, target * classes + prediction, classes * classes)
    counts = torch.bincount(place, minlength=classes * classes + 1)
    return counts[:-1].view(classes, classes)


def boundary(prediction: Tensor, target: Tensor, classes: int, ignore: int, share: float = 0.02) -> Tensor:
    """Class ids (H, W) of one image -> (2, classes): pixels in both boundaries, and in either.

    Boundary IoU (Cheng et al. 2021, section 4): of each mask only the pixels no farther than ``share`` of the image's
    diagonal from its contour count. The border of the image is a contour, as in the authors' code.
    """
    height, width = target.shape
    reach = max(1, round(share * (height**2 + width**2) ** 0.5))
    known = target != ignore
    sums = torch.zeros(2, classes, dtype=torch.float64, device=target.device)
    for label in torch.unique(torch.cat([target[known], prediction[known]])).tolist():
        if not 0 <= label < classes:
            continue
        one, other = (_rim(ids == label, reach) & known for ids in (prediction, target))
        sums[0, label], sums[1, label] = (one & other).sum(), (one | other).sum()
    return sums


def _rim(mask: Tensor, reach: int) -> Tensor:
    """(H, W) bool -> the pixels that eroding ``reach`` times by a square of 3 takes away."""
    outside = F.pad((~mask).float()[None, None], [reach] * 4, value=1.0)
    size = 2 * reach + 1
    near = F.max_pool2d(F.max_pool2d(outside, (size, 1), 1), (1, size), 1)[0, 0] > 0
    return mask & near


def iou(sums: Tensor) -> Tensor:
    """(..., 3, K) pixels right, predicted and true of each class -> (..., K); NaN for a class that is in neither."""
    right, predicted, true = sums.double().unbind(-2)
    return right / (predicted + true - right)


def mean_iou(sums: Tensor) -> Tensor:
    """(..., 3, K) -> (...,), the mean over the classes that are in prediction or truth."""
    return iou(sums).nanmean(-1)


class SemanticScores:
    """Adds up the confusion matrices of images; everything else follows from them."""

    def __init__(self) -> None:
        self.total: Any = 0  #: (K, K)
        self.images: list[Tensor] = []  #: (3, K) of each
        self.boundaries: list[Tensor] = []  #: (2, K) of each, where they are given
        self.bins: list[Tensor] = []  #: (3, BINS) of each, where they are given

    def update(self, matrices: Tensor, extra: Any = None) -> None:
        """Add matrices (B, K, K), rows true and columns predicted."""
        self.total = self.total + matrices.sum(0)
        sums = [matrices.diagonal(dim1=1, dim2=2), matrices.sum(1), matrices.sum(2)]
        self.images += list(torch.stack(sums, 1))

    def join(self, parts: list[SemanticScores]) -> None:
        """Become the sum of the parts that several processes have counted."""
        device = "cpu"
        totals = [part.total.to(device) for part in parts if part.images]
        self.total = torch.stack(totals).sum(0) if totals else 0
        for name in ("images", "boundaries", "bins"):
            setattr(self, name, [one.to(device) for part in parts for one in getattr(part, name)])

    def compute(self) -> dict[str, float]:
        """Return mIoU, mean accuracy and pixel accuracy, in 0..1."""
        sums = torch.stack(self.images).sum(0)
        right, _, true = sums.double()
        return {
            "miou": float(mean_iou(sums)),
            "macc": float((right / true)[true > 0].mean()),
            "aacc": float(right.sum() / true.sum()),
        }

    def details(self) -> dict[str, Any]:
        """Return what a report shows beside the means: a value or None for each class, and intervals."""
        images = torch.stack(self.images).cpu()
        sums = images.sum(0)
        right, _, true = sums.double()
        said: dict[str, Any] = {
            **self.compute(),
            "images": len(images),
            "per_class": listed(iou(sums)),
            "per_class_accuracy": listed(right / true),
            "pixels": true.long().tolist(),
            "confusion": self.total.cpu().tolist(),
            "per_image": listed(mean_iou(images)),
            "interval": {"miou": list(interval(images, mean_iou))},
        }
        if self.boundaries:
            rims = torch.stack(self.boundaries).sum(0).cpu()
            values = rims[0] / rims[1]
            said |= {"boundary_iou": float(values.nanmean()), "per_class_boundary_iou": listed(values)}
        if self.bins:
            said["ece"] = float(ece(torch.stack(self.bins).sum(0)))
        return said


def listed(values: Tensor) -> list[float | None]:
    """Return numbers as JSON has them, None for what is not defined."""
    return [float(v) if v == v else None for v in values.cpu()]
