"""What detectors are trained on: boxes and masks, in COCO's format or in YOLO's, as samples."""

from __future__ import annotations

from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from adaptkit.pictures import CHANNELS

from .augment import colours
from .coco import Instances, channels_of, locate, picture_of, read_instances, rle, size_of
from .order import Rows
from .yolo import is_yolo, read_yolo


def open_instances(
    name: str, images: str | None, split: str, masks: bool, flag: str, skip: bool = False, channels: int = CHANNELS
) -> Instances:
    """Read a split of boxes or masks, in COCO's format or in YOLO's, as :func:`read_instances` does."""
    if not is_yolo(name):
        path, folder = locate(name, images, flag)
        return read_instances(folder, path, masks, flag, skip, channels)
    if images is not None:
        raise ValueError(
            f"{flag}-images is for COCO's format; {name} is in YOLO's, and data.yaml says where images are"
        )
    return read_yolo(name, split, masks, flag, skip, channels)


class Detection(Rows):
    """Samples (image (C, H, W) in 0..1, target) as torchvision's detectors take them; images keep their size.

    target: ``boxes`` (n, 4) as x1, y1, x2, y2 in pixels, ``labels`` (n,) from 1 on, ``image_id``, and ``masks``
    (n, H, W) where asked for. Training samples are flipped and, of three channels, coloured.
    """

    def __init__(self, data: Instances, masks: bool, seed: int = 0, train: bool = False) -> None:
        super().__init__(data.rows, seed)
        self.masks, self.channels = masks, channels_of(data.rows[0])
        steps: list[Any] = [v2.RandomHorizontalFlip(), *colours("medium", self.channels)] if train else []
        self.transform = v2.Compose([*steps, v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)])

    def make(self, row: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Row -> sample."""
        from faster_coco_eval import mask

        size, found, image = size_of(row), row["instances"], picture_of(row)
        boxes = torch.tensor([i["box"] for i in found], dtype=torch.float32).view(-1, 4)
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([i["label"] for i in found], dtype=torch.int64),
            "image_id": torch.tensor(row["id"]),
        }
        if self.masks:
            drawn = [torch.from_numpy(mask.decode(rle(i["shape"], row))).view(size) for i in found]
            target["masks"] = tv_tensors.Mask(torch.stack(drawn) if drawn else torch.zeros(0, *size, dtype=torch.uint8))
        image, target = self.transform(image, target)
        plain = {k: v.as_subclass(torch.Tensor) for k, v in target.items()}
        return image.as_subclass(torch.Tensor), plain


def as_lists(batch: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """Samples -> (images, targets), for images differ in size."""
    images, targets = zip(*batch)
    return list(images), list(targets)
