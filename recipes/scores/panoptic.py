"""Panoptic quality: matched segments, their overlap and their count, over all images and for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bootstrap import interval
from .segmentation import listed


class PanopticQuality:
    """Panoptic, segmentation and recognition quality over all images (Kirillov et al. 2019, section 4.1).

    Of each category, over its true positives (IoU above a half), false positives and false negatives::

        SQ = sum of IoU / TP        RQ = TP / (TP + FP / 2 + FN / 2)        PQ = SQ * RQ

    then the mean over the categories that occur. torchmetrics matches the segments. It would forgive a segment that
    was missed where the prediction says nothing, so "nothing" is one more category to it, left out of the mean.
    """

    def __init__(self, categories: list[dict[str, Any]]) -> None:
        from torchmetrics.detection import PanopticQuality

        things = {i for i, c in enumerate(categories) if c["isthing"]}
        self.things, self.nothing = len(things), len(categories)
        stuff = set(range(len(categories) + 1)) - things
        self.metric = PanopticQuality(things, stuff, allow_unknown_preds_category=True, sync_on_compute=False)
        self.images: list[Tensor] = []  #: (4, K), what each image added to the sums

    def update(self, maps: list[Tensor], truth: list[Tensor]) -> None:
        for found, true in zip(maps, truth):
            before = self._counted()
            self.metric.update(relabelled(found, self.nothing), relabelled(true, self.nothing + 1))  # 1 more: ignored
            self.images.append((self._counted() - before).cpu())

    def _counted(self) -> Tensor:
        """Sum of IoU, TP, FP and FN of each category (4, K), things first, then stuff."""
        counted = (self.metric.iou_sum, self.metric.true_positives, self.metric.false_positives)
        return torch.stack([x[:-1].double() for x in (*counted, self.metric.false_negatives)])

    def by_class(self) -> list[float | None]:
        """PQ of each category, in the order of their labels; None for one that does not occur."""
        iou, tp, fp, fn = self._counted()
        values = iou / (tp + fp / 2 + fn / 2)
        place = self.metric.cat_id_to_continuous_id
        ordered = [float(values[place[label]]) for label in range(self.nothing)]
        return [None if value != value else value for value in ordered]

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
        iou, tp, fp, fn = self._counted()
        occurs = tp + fp + fn > 0
        sq, rq = iou / tp.clamp_min(1), tp / (tp + fp / 2 + fn / 2).clamp_min(0.5)
        thing = torch.arange(len(tp)) < self.things
        scores = {"pq": sq * rq, "sq": sq, "rq": rq}
        means = {name: mean(values[occurs]) for name, values in scores.items()}
        return {**means, "pq_things": mean((sq * rq)[occurs & thing]), "pq_stuff": mean((sq * rq)[occurs & ~thing])}


def mean_quality(sums: Tensor) -> Tensor:
    """(..., 4, K) sums as :meth:`PanopticQuality._counted` -> PQ (...,), the mean over the categories that occur."""
    iou, tp, fp, fn = sums.unbind(-2)
    return (iou / (tp + fp / 2 + fn / 2)).nanmean(-1)


def relabelled(x: Tensor, label: int) -> Tensor:
    """(H, W, 2) -> (1, H, W, 2), the label -1 replaced."""
    return torch.where(x[..., :1] < 0, torch.tensor([label, 0]), x)[None]


def mean(values: Tensor) -> float:
    """0 where there is nothing to average: no category of the kind occurs."""
    return float(values.mean()) if len(values) else 0.0
