"""Validation at the images' own size: what is predicted is compared with the masks as they are stored."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from torch import Tensor

from adaptkit.pictures import pair
from adaptkit.predict.predicts import Predicts
from adaptkit.predict.tasks import TASKS, Asked, Segments
from adaptkit.predict.transform import transform_of
from adaptkit.predict.ways import Ways

from .data import SegmentationData
from .labels import check_range
from .normalisation import floats, source_of
from .order import Rows

WAYS_HELP = """in validation, move a window of H x W pixels over the image, as ADE20K (512 512) and Cityscapes are
scored; default: the whole image at once, its shorter side as trained"""


def options(p: argparse.ArgumentParser) -> None:
    """Add how images are looked at in validation."""
    p.add_argument("--slide", type=int, nargs=2, metavar=("H", "W"), help=WAYS_HELP)
    p.add_argument("--stride", type=int, nargs=2, metavar=("H", "W"), help="of the window; default: two thirds of it")
    p.add_argument("--resize", metavar="SIDE", help="in validation: the shorter side in pixels, or native")
    p.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="X", help="average over these sizes too")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, default=False, help="and over the mirrored image")


def ways(args: argparse.Namespace, batch_size: int | None = None) -> Ways:
    """Return them, for ``--batch-size`` images at once; ``ValueError`` for a window or a size that is none."""
    resize = args.resize
    if resize not in (None, "native"):
        if not str(resize).isdigit():
            raise ValueError(f"--resize {resize}: give the shorter side in pixels, or native")
        resize = int(resize)
    slide, stride = (None if v is None else (v[0], v[1]) for v in (args.slide, args.stride))
    return Ways(slide, stride, resize, tuple(args.scales), args.flip, batch_size=batch_size or args.batch_size)


class NativeSegmentation(Rows):
    """Pairs (image (C, H, W) in 0..1, mask (H, W) uint8 or int32), both at their own size; batches are lists."""

    def __init__(self, rows: SegmentationData) -> None:
        super().__init__(rows.data, rows.seed, rows.name)
        self.rows, self.summary, self.channels = rows, rows.summary, rows.channels

    def make(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Row with image and mask -> (image, mask)."""
        ids = self.rows.labels.ids(row["mask"])
        if self.rows.classes is not None:
            check_range(ids, self.rows.classes, self.rows.ignore, row["mask"].name)
        image, mask = pair(row["image"], row["mask"], ids, "a mask")
        return floats(image), mask

    def collate(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """Samples -> (images, masks), for images differ in size."""
        images, masks = zip(*samples)
        return list(images), list(masks)


def predictor(model: Any, args: argparse.Namespace, asked: Asked | None = None) -> Any:
    """Return the task of ``adaptkit.predict`` that this model predicts, with the size and the ways of ``args``."""
    bare: Predicts = getattr(model, "module", model)  # DDP wraps it
    described = bare.described()
    source = source_of(bare.vit, args)
    said = {**described.said, "size": args.size, "mean": source.mean, "std": source.std}
    described = replace(described, said=said)
    transform = transform_of(source, said, described.answers, bare.vit.spec.channels)
    return TASKS[described.answers](bare, described, transform, asked or Asked(ways(args)))


def groups(task: Any, images: list[Tensor]) -> list[list[int]]:
    """Return the numbers of the images that can run together."""
    found: list[list[int]] = []
    for i, image in enumerate(images):
        there = next((g for g in found if task.together(images[g[0]], image)), None)
        if there is None:
            found.append([i])
        else:
            there.append(i)
    return found


def masks(task: Segments, images: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """Images -> the class of each pixel (H, W), and its probability where ``task`` was asked for it."""
    found: dict[int, tuple[Tensor, Tensor | None]] = {}
    for numbers in groups(task, images):
        together = [images[i] for i in numbers]
        for i, streams in zip(numbers, task.streams(together)):
            mask, confidence, _ = task.labelled(streams, images[i].shape[-2])
            found[i] = mask, confidence
    return [found[i] for i in range(len(images))]
