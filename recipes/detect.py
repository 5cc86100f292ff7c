"""Detection: train an adapter and one of torchvision's detectors, or PMT's plain-mask, on a frozen ViT; COCO's AP.

    python -m recipes.detect --train coco/annotations/instances_train2017.json --train-images coco/train2017 \
        --val coco/annotations/instances_val2017.json --val-images coco/val2017 \
        --model mask-rcnn --adapter vit-adapter --size 800 1333 --steps 90000 --batch-size 2 --out runs/detect

Or name a folder that holds `annotations.json` and `images/`, or `data.yaml` of a set in YOLO's format.
Boxes alone are enough for faster-rcnn, retinanet and fcos; mask-rcnn and plain-mask want a segmentation of every
instance. Several GPUs: `torchrun --nproc_per_node 8 -m recipes.detect`. Scores are COCO's: AP, AP50, AP75, and AP of
small, medium and large objects.

Cascade R-CNN, with which DAT's and ViT-Adapter's papers also report AP, is not here: these detectors are torchvision's,
which has no cascade of box heads, and one of our own could be checked against nothing. In a library that has one, an
adapted model's `.maps`, of strides 4 to 32, take the place of a ResNet's before its FPN.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

import adaptkit

from . import channels, network, queries
from . import instances as by_queries
from .channels import backbone_of, trained_parts
from .coco import Instances, summary_of, warn_unseen_categories
from .detection_data import Detection, as_lists, open_instances
from .engine import run
from .normalisation import source_of
from .options import adapters, command, parser, read
from .scores.average_precision import STATS, as_results, average_precision, average_precisions
from .scores.detection import image_f1
from .task import Task
from .yolo import has_splits

MODELS = ("mask-rcnn", "faster-rcnn", "retinanet", "fcos", queries.HEAD)


SIZE_HELP = "of the sides; of plain-mask, height and width"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = parser("detect", __doc__, adapter=["vit-adapter"], lr=1e-4, weight_decay=0.05, batch_size=2)
    p.add_argument("--train-images", help="folder of the images; default: images/ beside the annotations")
    p.add_argument("--val-images", help="the same for validation")
    p.add_argument("--model", default="mask-rcnn", choices=MODELS)
    p.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("SHORT", "LONG"), help=SIZE_HELP)
    p.add_argument("--width", type=int, default=256, help="channels of the detector's FPN")
    p.add_argument("--anchor", type=float, default=8.0, help="side of the anchors, in strides of their level")
    p.add_argument("--skip-degenerate", action=argparse.BooleanOptionalAction, default=False, help="boxes of no area")
    p.add_argument("--queries", type=int, default=200, help="of plain-mask")
    p.add_argument("--points", type=int, default=12544, help="of each mask that the loss of plain-mask looks at")
    queries.options(p)
    channels.options(p)
    args = read(p, argv)
    args.head = args.model  # as the other recipes say it in result.json
    if args.streaming:
        p.error("--streaming reads rows as they come; COCO's format is files: leave it out")
    if not args.val and not has_splits(args.train):
        p.error(
            "--val is needed: a JSON file in COCO's format, or a folder with annotations.json; or data.yaml of YOLO"
        )
    queries.settle(p, args)
    if args.model != queries.HEAD and (args.size[0] > args.size[1] or args.size[0] < 1):
        p.error(f"--size {args.size[0]} {args.size[1]}: give the shorter side first, in pixels")
    if args.width < 1:
        p.error(f"--width {args.width} must be at least 1")
    if args.model == "fcos" and (args.width % 32 or args.width < 64):
        p.error(f"--width {args.width}: fcos norms in 32 groups of two channels or more; give 64, 96, ...")
    if args.anchor <= 0:
        p.error(f"--anchor {args.anchor} must be larger than 0")
    return args


def masks(args: argparse.Namespace) -> bool:
    return args.model in ("mask-rcnn", queries.HEAD)


def instances(args: argparse.Namespace, train: bool, count: int | None = None) -> Instances:
    """Read a split, whose images have ``count`` channels; None: as the options say."""
    flag, name = ("--train", args.train) if train else ("--val", args.val)
    images, split = (args.train_images, "train") if train else (args.val_images, "validation")
    count = count or channels.of_files(args)
    return open_instances(name or args.train, images, split, masks(args), flag, args.skip_degenerate, count)


def build(args: argparse.Namespace) -> Any:
    data = instances(args, True)  # the data is checked before anything is built
    categories = data.categories
    warn_unseen_categories(data)
    found = instances(args, False).categories
    if not same(found, categories):
        raise ValueError(f"--val has categories {names(found)}, --train has {names(categories)}: they must be the same")
    if args.model == queries.HEAD:
        return queries.build(args, len(categories), "instance")
    backbone = backbone_of(args)
    settle(args, adaptkit.view(backbone), data)
    source = source_of(adaptkit.view(backbone), args)
    recipe = {
        "network": args.model,
        "categories": [{"id": c["id"], "name": c.get("name", str(c["id"]))} for c in categories],
        "size": list(args.size),
        "width": args.width,
        "anchor": args.anchor,
        "mean": list(source.mean),
        "std": list(source.std),
    }
    adapted = adaptkit.attach(backbone, *adapters(args), train_backbone=trained_parts(backbone, args))
    return network.build(adapted, recipe).train()


def settle(args: argparse.Namespace, vit: Any, found: Instances) -> None:
    """See :func:`recipes.channels.settle`."""
    channels.settle(args, vit, channels.as_images(found.rows), "--train")


def same(found: list[dict[str, Any]], known: list[dict[str, Any]]) -> bool:
    """Whether two lists of categories have the same ids, and the same names where both name them."""
    return len(found) == len(known) and all(
        a["id"] == b["id"] and str(a.get("name", b.get("name"))) == str(b.get("name", a.get("name")))
        for a, b in zip(found, known)
    )


def names(categories: list[dict[str, Any]]) -> str:
    return ", ".join(f"{c['id']} {c.get('name', '')}".strip() for c in categories)


def data(args: argparse.Namespace, model: Any, train: bool) -> Detection | by_queries.InstanceData:
    found = instances(args, train, model.vit.spec.channels)
    if train:
        settle(args, model.vit, found)
    rows: Any
    if args.model == queries.HEAD:
        rows = by_queries.InstanceData(found, args.size, source_of(model.vit, args), args.seed, train)
    else:
        rows = Detection(found, masks(args), args.seed, train)
    rows.summary = summary_of(found, "boxes", train)
    empty = sum(not row["instances"] for row in found.rows)
    rows.summary.facts = [f"{empty:,} images without an object"] if empty else []
    return rows


def loss(model: nn.Module, batch: Any, args: argparse.Namespace) -> Tensor:
    return sum(value.float() for value in model(*batch).values())  # type: ignore[return-value]


def predict(model: nn.Module, batch: Any, args: argparse.Namespace) -> tuple[list[Any], list[int]]:
    """Entries of COCO's result format, per image, and the images' ids."""
    images, targets = batch
    ids = torch.stack([target["image_id"] for target in targets]).tolist()
    return [as_results(found, i) for found, i in zip(model(images), ids)], ids


class AveragePrecision:
    """COCO's AP over all images; each counts once, even where a rank was given one twice to fill its batch."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.data, self.masks = instances(args, False), masks(args)
        self.found: dict[int, list[dict[str, Any]]] = {}

    def update(self, results: list[list[dict[str, Any]]], ids: list[int]) -> None:
        self.found.update(zip(ids, results))

    def compute(self) -> dict[str, float]:
        return average_precision(self.data, self._entries(), self.masks)

    def _entries(self) -> list[dict[str, Any]]:
        return [entry for row in self.found.values() for entry in row]

    def details(self) -> dict[str, Any]:
        """Return the means, and what a report shows beside them; an image scores its F1 (``scores.detection``)."""
        means, by_class = average_precisions(self.data, self._entries(), self.masks)
        return {
            **means,
            "images": len(self.data.rows),
            "per_class": by_class["mask" if self.masks else "box"],
            "per_image": [image_f1(self.found.get(row["id"], []), row["instances"]) for row in self.data.rows],
        }


PERCENT = tuple(f"{kind}_{k}" for kind in ("box", "mask") for k in STATS)
TASK = Task(
    "detect",
    "object-detection",
    "box_ap",
    PERCENT,
    build,
    data,
    loss,
    predict,
    AveragePrecision,
    ragged=True,
    collate=as_lists,
    save=network.save,
    restore=network.restore,
    again=network.again,
)


def task(args: argparse.Namespace) -> Task:
    """What these options train."""
    if args.model != queries.HEAD:
        return TASK
    return by_queries.task(TASK, instances(args, True).categories)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    return run(task(args), args)


if __name__ == "__main__":
    command("detect", main)
