"""Instance segmentation by queries: `recipes/detect.py` with --model plain-mask."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from adaptkit.core.view import Source
from adaptkit.pictures import framed, read

from . import queries
from .coco import Instances, as_results, rle
from .normalisation import normalise
from .order import Rows
from .panoptic_data import sized, stacked
from .task import Task, attach_again, restore_adapted


class InstanceData(Rows):
    """Samples (image (3, h, w) normalised, target), all resized to one size; ``target`` is a dict.

    Training: ``masks`` (n, h, w) in 0..1 and ``labels`` (n,) from 0 on, of what is left after crop and flip. Otherwise
    ``image_id``, and ``size`` (H, W) of the image itself.
    """

    def __init__(
        self, data: Instances, size: tuple[int, int], source: Source, seed: int = 0, train: bool = False
    ) -> None:
        super().__init__(data.rows, seed)
        self.train = train
        self.transform = v2.Compose([*sized(size, train), normalise(source)])

    def make(self, row: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Row -> sample."""
        from faster_coco_eval import mask

        size = row["height"], row["width"]
        image = framed(read(row["path"]), size)
        if not self.train:
            return self.transform(image).as_subclass(Tensor), {"image_id": row["id"], "size": size}
        drawn = [torch.from_numpy(mask.decode(rle(i["shape"], row))).view(size) for i in row["instances"]]
        masks = torch.stack(drawn) if drawn else torch.zeros(0, *size, dtype=torch.uint8)
        image, masks = self.transform(image, tv_tensors.Mask(masks))
        labels = torch.tensor([i["label"] - 1 for i in row["instances"]], dtype=torch.int64)
        left = (masks > 0).as_subclass(Tensor).flatten(1).any(1)
        return image.as_subclass(Tensor), {"masks": masks.as_subclass(Tensor)[left].float(), "labels": labels[left]}


def task(base: Task, args: argparse.Namespace, categories: list[dict[str, Any]]) -> Task:
    """The task of detection, with this head."""
    kept = [{"id": c["id"], "name": str(c.get("name", c["id"]))} for c in categories]

    def save(model: Any, folder: Path, **metadata: Any) -> Path:
        return model.save(folder, categories=kept, framing="squash", **metadata)

    files: dict[str, Any] = {"save": save, "restore": restore_adapted, "again": attach_again}
    return dataclasses.replace(base, score="mask_ap", loss=loss, predict=predict, collate=stacked, **files)


def loss(model: nn.Module, batch: Any, args: argparse.Namespace) -> Tensor:
    image, targets = batch
    return queries.loss(model, image, [(t["masks"], t["labels"]) for t in targets], args)


def predict(model: nn.Module, batch: Any, args: argparse.Namespace) -> tuple[list[Any], list[int]]:
    """Entries of COCO's result format, per image, and the images' ids."""
    image, targets = batch
    head: Any = queries.head_in(model)
    found = head.objects(model(image), [t["size"] for t in targets])
    ids = [t["image_id"] for t in targets]
    return [as_results(one, i) for one, i in zip(found, ids)], ids
