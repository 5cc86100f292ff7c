"""Panoptic segmentation: train an adapter and Mask2Former, or PMT's plain-mask, on a frozen ViT; score it by PQ.

    python -m recipes.panoptic --train coco/annotations/panoptic_train2017.json --train-images coco/train2017 \
        --val coco/annotations/panoptic_val2017.json --val-images coco/val2017 \
        --adapter vit-adapter --size 640 640 --steps 90000 --batch-size 2 --out runs/panoptic

The PNG files lie in the folder beside the JSON that has its name, or in --train-maps and --val-maps. Or name a folder
that holds `panoptic.json`, `images/` and `panoptic/`. Several GPUs: `torchrun --nproc_per_node 8 -m recipes.panoptic`.
"""

from __future__ import annotations

import argparse
from typing import Any

from torch import Tensor, nn

import adaptkit
from adaptkit.ops.queries import merge

from . import channels, network, queries
from .channels import backbone_of, trained_parts
from .coco import summary_of, warn_unseen_categories
from .engine import run
from .normalisation import source_of
from .options import adapters, command, parser, read
from .panoptic_data import PanopticData, Segments, locate, read_segments, stacked
from .scores.panoptic import PanopticQuality
from .task import Task

HEAD_HELP = """mask2former on the pyramid of an adapter, or plain-mask on the frozen backbone itself, without an
adapter or with one that changes tokens (lora, ...)"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = parser("panoptic", __doc__, adapter=["vit-adapter"], lr=1e-4, weight_decay=0.05, clip=0.01, batch_size=2)
    for split in ("train", "val"):
        p.add_argument(f"--{split}-images", help="folder of the images; default: images/ beside the JSON file")
        p.add_argument(f"--{split}-maps", help="folder of the PNG files; default: beside the JSON file, with its name")
    p.add_argument("--size", type=int, nargs=2, default=(640, 640), metavar=("H", "W"))
    p.add_argument("--head", default="mask2former", choices=["mask2former", queries.HEAD], help=HEAD_HELP)
    network.mask2former_options(p)
    queries.options(p)
    channels.options(p)
    p.add_argument("--object-threshold", type=float, default=0.8, help="least score of a query that is drawn")
    p.add_argument("--overlap-threshold", type=float, default=0.8, help="least share of its mask that must be visible")
    args = read(p, argv)
    if args.streaming:
        p.error("--streaming reads rows as they come; COCO's format is files: leave it out")
    if not args.val:
        p.error("--val is needed: a JSON file in COCO's panoptic format, or a folder with panoptic.json")
    network.check_mask2former(p, args)
    queries.settle(p, args)
    return args


def segments(args: argparse.Namespace, train: bool, count: int | None = None) -> Segments:
    """Read a split, whose images have ``count`` channels; None: as the options say."""
    flag, split = ("--train", "train") if train else ("--val", "val")
    places = locate(getattr(args, split), getattr(args, f"{split}_images"), getattr(args, f"{split}_maps"), flag)
    return read_segments(*places, flag, count or channels.of_files(args))


def build(args: argparse.Namespace) -> Any:
    data = segments(args, True)  # the data is checked before anything is built
    categories = data.categories
    warn_unseen_categories(data)
    found = segments(args, False).categories
    if [(c["id"], c["isthing"]) for c in found] != [(c["id"], c["isthing"]) for c in categories]:
        raise ValueError("--val and --train do not have the same categories (id and isthing of each)")
    kept = said_of(args)
    if args.head == queries.HEAD:
        things = [i for i, c in enumerate(kept["categories"]) if c["isthing"]]
        return queries.build(args, len(categories), "panoptic", things)
    backbone = backbone_of(args)
    recipe = {"network": "mask2former", **kept, **network.mask2former_recipe(args)}
    adapted = adaptkit.attach(backbone, *adapters(args), train_backbone=trained_parts(backbone, args))
    return network.build(adapted, recipe).train()


def said_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a file says of categories, and of how queries become segments."""
    kept = [{k: c.get(k) for k in ("id", "name", "isthing")} for c in segments(args, True).categories]
    return {"categories": kept, "thresholds": [args.object_threshold, args.overlap_threshold]}


def data(args: argparse.Namespace, model: Any, train: bool) -> PanopticData:
    found = segments(args, train, model.vit.spec.channels)
    if train:
        channels.settle(args, model.vit, channels.as_images(found.rows), "--train")
    rows = PanopticData(found, args.size, source_of(model.vit, args), args.seed, train)
    rows.summary = summary_of(found, "segments", train)
    return rows


def loss(model: nn.Module, batch: Any, args: argparse.Namespace) -> Tensor:
    image, targets = batch
    found = model(image, mask_labels=[t["masks"] for t in targets], class_labels=[t["labels"] for t in targets])
    labelled = any(len(t["labels"]) for t in targets)  # where none of a batch is, there is nothing to be right about
    return found.loss.sum() * labelled  # transformers gives it a dimension of one


# ------------------------------------------------------------------------------------------------------ predict


def predict(model: Any, batch: Any, args: argparse.Namespace) -> tuple[list[Tensor], list[Tensor]]:
    image, targets = batch
    found, truth = model(image), [t["truth"] for t in targets]
    recipe = recipe_of(model)
    things = {i for i, c in enumerate(recipe["categories"]) if c["isthing"]}
    maps = [
        merge(classes, masks, (t.shape[0], t.shape[1]), things, tuple(recipe["thresholds"]))
        for classes, masks, t in zip(found.class_queries_logits, found.masks_queries_logits, truth)
    ]
    return maps, truth


def query_predict(model: Any, batch: Any, args: argparse.Namespace) -> tuple[list[Tensor], list[Tensor]]:
    image, targets = batch
    head: Any = queries.head_in(model)
    truth = [t["truth"] for t in targets]
    sizes = [(t.shape[0], t.shape[1]) for t in truth]
    return head.segments(model(image), sizes, (args.object_threshold, args.overlap_threshold)), truth


def recipe_of(model: Any) -> dict[str, Any]:
    """Of a network, whatever DDP has wrapped it in."""
    return next(m.recipe for m in model.modules() if isinstance(m, network.Network))


def metric(args: argparse.Namespace) -> PanopticQuality:
    return PanopticQuality(segments(args, False).categories)


TASK = Task(
    "panoptic",
    "image-segmentation",
    "pq",
    ("pq", "sq", "rq", "pq_things", "pq_stuff"),
    build,
    data,
    loss,
    predict,
    metric,
    ragged=True,
    collate=stacked,
    save=network.save,
    restore=network.restore,
    again=network.again,
)


def task(args: argparse.Namespace) -> Task:
    """The task, with this head."""
    if args.head != queries.HEAD:
        return TASK
    return queries.task(TASK, lambda: said_of(args), predict=query_predict)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    return run(task(args), args)


if __name__ == "__main__":
    command("panoptic", main)
