"""Panoptic quality: matched segments, their overlap and their count, over all images and for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bootstrap import interval
from .segmentation import listed

__all__ = ["CROWD", "NOTHING", "PanopticQuality", "counted"]

NOTHING = -1  #: the label of what belongs to no segment
CROWD = -2  #: less k, the label of a crowd of category k
IDS = 2**24  #: a segment's id is three bytes, the colour of its pixels


class PanopticQuality:
    """Panoptic, segmentation and recognition quality over all images (Kirillov et al. 2019, section 4.1).

    Of each category, over its true positives (IoU above a half), false positives and false negatives::

        SQ = sum of IoU / TP        RQ = TP / (TP + FP / 2 + FN / 2)        PQ = SQ * RQ

    then the mean over the categories that occur.
    """

    def __init__(self, categories: list[dict[str, Any]]) -> None:
        self.thing = torch.tensor([bool(c["isthing"]) for c in categories])
        self.images: list[Tensor] = []  #: (4, K), of each image sum of IoU, TP, FP and FN of each category

    def update(self, maps: list[Tensor], truth: list[Tensor]) -> None:
        """Count images: label and segment id of each pixel, (H, W, 2) each, as found and as :func:`counted` has it."""
        self.images += [counted(found, true, len(self.thing)) for found, true in zip(maps, truth)]

    def by_class(self) -> list[float | None]:
        """PQ of each category; None for one that does not occur."""
        iou, tp, fp, fn = torch.stack(self.images).sum(0)
        values = (iou / (tp + fp / 2 + fn / 2)).tolist()
        return [None if value != value else value for value in values]

    def details(self) -> dict[str, Any]:
        """Return the means, and what a report shows beside them; the categories in the order of their labels."""
        images = torch.stack(self.images)
        between = interval(images, mean_quality)
        return {
            **self.compute(),
            "images": len(images),
            "per_class": self.by_class(),
            "per_image": listed(mean_quality(images)),
            "interval": {"pq": list(between)},
        }

    def compute(self) -> dict[str, float]:
        """Return the means over the categories that occur, and over those that are things and stuff."""
        iou, tp, fp, fn = torch.stack(self.images).sum(0)
        occurs = tp + fp + fn > 0
        sq, rq = iou / tp.clamp_min(1), tp / (tp + fp / 2 + fn / 2).clamp_min(0.5)
        scores = {"pq": sq * rq, "sq": sq, "rq": rq}
        means = {name: mean(values[occurs]) for name, values in scores.items()}
        things, stuff = (mean((sq * rq)[occurs & kind]) for kind in (self.thing, ~self.thing))
        return {**means, "pq_things": things, "pq_stuff": stuff}


def counted(found: Tensor, true: Tensor, categories: int) -> Tensor:
    """Count one image as COCO's evaluation does.

    Args:
        found, true: label and segment id of each pixel (H, W, 2); the label is a category or :data:`NOTHING`, in the
            truth also ``CROWD - k``. What is unlabelled counts in no union. A segment that matches nothing is forgiven
            where more than half of it is unlabelled or in a crowd of its category; a crowd that is missed is, too.
        categories: K.

    Returns (4, K) float64 on the CPU: the sum of IoU, true positives, false positives, false negatives.
    """
    (known, t), (said, f) = segments(true), segments(found)
    overlap = torch.bincount(t * len(said) + f, minlength=len(known) * len(said)).view(len(known), len(said)).double()
    void = overlap[known == NOTHING].sum(0)  # of each that was found, its unlabelled pixels
    union = overlap.sum(1)[:, None] + overlap.sum(0) - overlap - void
    hit = (known[:, None] == said) & (said >= 0) & (overlap > union / 2)  # at most one for each
    crowd = (overlap * (known[:, None] == CROWD - said)).sum(0)
    forgiven = void + crowd > overlap.sum(0) / 2
    missed, wrong = (known >= 0) & ~hit.any(1), (said >= 0) & ~hit.any(0) & ~forgiven
    which, one = hit.any(0), (overlap / union.clamp_min(1) * hit).sum(0)
    sums = torch.zeros(4, categories, dtype=torch.float64, device=overlap.device)
    for row, labels, value in ((0, said[which], one[which]), (1, said[which], 1.0), (2, said[wrong], 1.0),
                               (3, known[missed], 1.0)):  # fmt: skip
        sums[row].index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64) * value)
    return sums.cpu()


def segments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Label and id of each pixel (H, W, 2) -> the label of each segment (n,), and each pixel's segment (H * W,)."""
    keys, index = (x[..., 0] * IDS + x[..., 1]).flatten().unique(return_inverse=True)
    return keys.div(IDS, rounding_mode="floor"), index


def mean_quality(sums: Tensor) -> Tensor:
    """(..., 4, K) sums as :func:`counted` gives them -> PQ (...,), the mean over the categories that occur."""
    iou, tp, fp, fn = sums.unbind(-2)
    return (iou / (tp + fp / 2 + fn / 2)).nanmean(-1)


def mean(values: Tensor) -> float:
    """0 where there is nothing to average: no category of the kind occurs."""
    return float(values.mean()) if len(values) else 0.0
