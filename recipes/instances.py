"""Instance segmentation by queries: `recipes/detect.py` with --model plain-mask."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from . import queries
from .coco import called, picture_of, rle, size_of
from .panoptic_data import Resized, stacked
from .scores.average_precision import as_results
from .task import Task


class InstanceData(Resized):
    """Samples (image (3, h, w) normalised, target), all resized to one size; ``target`` is a dict.

    Training: ``masks`` (n, h, w) in 0..1 and ``labels`` (n,) from 0 on, of what is left after crop and flip. Otherwise
    ``image_id``, and ``size`` (H, W) of the image itself.
    """

    def make(self, row: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Row -> sample."""
        from faster_coco_eval import mask

        size, image = size_of(row), picture_of(row)
        if not self.train:
            return self.transform(image).as_subclass(Tensor), {"image_id": row["id"], "size": size}
        drawn = [torch.from_numpy(mask.decode(rle(i["shape"], row))).view(size) for i in row["instances"]]
        masks = torch.stack(drawn) if drawn else torch.zeros(0, *size, dtype=torch.uint8)
        image, masks = self.transform(image, tv_tensors.Mask(masks))
        labels = torch.tensor([i["label"] - 1 for i in row["instances"]], dtype=torch.int64)
        left = (masks > 0).as_subclass(Tensor).flatten(1).any(1)
        return image.as_subclass(Tensor), {"masks": masks.as_subclass(Tensor)[left].float(), "labels": labels[left]}


def task(base: Task, categories: list[dict[str, Any]]) -> Task:
    """The task of detection, with this head."""
    kept = [{"id": c["id"], "name": name} for c, name in zip(categories, called(categories))]
    said = {"categories": kept, "framing": "squash"}
    return queries.task(base, lambda: said, score="mask_ap", predict=predict, collate=stacked)


def predict(model: nn.Module, batch: Any, args: argparse.Namespace) -> tuple[list[Any], list[int]]:
    """Entries of COCO's result format, per image, and the images' ids."""
    image, targets = batch
    head: Any = queries.head_in(model)
    found = head.objects(model(image), [t["size"] for t in targets])
    ids = [t["image_id"] for t in targets]
    return [as_results(one, i) for one, i in zip(found, ids)], ids
