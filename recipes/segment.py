"""Semantic segmentation: train an adapter and a head beside a frozen ViT.

    python -m recipes.segment --train train.parquet --val val.parquet --num-classes 11 --backbone demo \
        --adapter vit-adapter --head fpn --size 240 320 --steps 400 --out runs/seg

On several GPUs start it with `torchrun --nproc_per_node 4 -m recipes.segment ...` or `accelerate launch`. A killed
run goes on with `--resume`: data order, augmentation and dropout depend on the step alone, so the result is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: F401  tests stop a run in it
from torch import Tensor, nn

import adaptkit
from adaptkit.losses import balanced_weights, dice_loss, focal_loss, lovasz_loss, pixel_loss
from adaptkit.predict.tasks import Asked

from . import augment, channels, names, native, network, queries, semantic
from .channels import backbone_of, trained_parts
from .data import SegmentationData, open_dataset
from .engine import run
from .initial import saved_head
from .look import check_labels
from .native import NativeSegmentation, masks, predictor, ways
from .normalisation import source_of
from .options import adapters, command, makes_pyramid, parser, read, validation
from .order import Rows
from .scores.segmentation import SemanticScores, confusion, extras, packed
from .task import Task

LOSSES = {"cross-entropy": pixel_loss, "dice": dice_loss, "focal": focal_loss, "lovasz": lovasz_loss}
LOSS_HELP = """one or several of cross-entropy, dice, focal and lovasz, added up: --loss cross-entropy dice=0.5"""
WEIGHTS_HELP = """of the classes in the loss: a number for each, or balanced, from the pixels of the training masks
(the fewer, the more: all classes weigh the same as a whole)"""


HEAD_HELP = """fpn, linear, upernet, mask2former, or plain-mask, which is without an adapter or with one that changes
tokens (lora, ...); default: the one that a file in --adapter or --init holds, else fpn, or linear without an adapter"""


def named(text: str) -> tuple[str, float]:
    """``dice=0.5`` -> name and weight, which is 1 where it is not given."""
    name, _, share = text.partition("=")
    return name, float(share or 1)


def loss_of(text: str) -> str:
    """Read one of ``--loss``, as argparse asks for it."""
    with contextlib.suppress(ValueError):
        name, share = named(text)
        if name in LOSSES and 0 < share < math.inf:
            return text
    raise argparse.ArgumentTypeError(f"{text!r}: give {', '.join(LOSSES)}, or one with a weight above 0, dice=0.5")


def check_weights(given: list[str], classes: int) -> list[Any]:
    """Read ``--class-weights``: as many numbers as classes, or ``balanced``; ``ValueError`` for anything else."""
    if given in ([], ["balanced"]):
        return given
    try:
        weights = [float(text) for text in given]
    except ValueError:
        raise ValueError(f"--class-weights {' '.join(given)}: give numbers, or balanced alone") from None
    if len(weights) != classes or not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise ValueError(
            f"--class-weights has {len(weights)} numbers and --num-classes is {classes}: give one for each class, 0 or "
            "more, not all 0"
        )
    return weights


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = parser("segment", __doc__, adapter=["vit-adapter"])
    p.add_argument(
        "--image-column", help="default: the one column of images, or the one named image; of a folder: images"
    )
    p.add_argument(
        "--mask-column",
        help="default: the other column of images, or the one named label, mask, ...; of a folder, its folder of masks",
    )
    p.add_argument("--num-classes", type=int, required=True)
    p.add_argument("--ignore-index", type=int, default=255)
    p.add_argument("--label-map", type=json.loads, default={}, metavar="JSON", help=names.MAP_HELP)
    p.add_argument("--palette", nargs="+", default=[], metavar="COLOUR", help=names.PALETTE_HELP)
    p.add_argument("--mask-suffix", metavar="_END", help=names.SUFFIX_HELP)
    p.add_argument("--reduce-zero-label", action=argparse.BooleanOptionalAction, default=False,
                   help="label 0 is ignored and the others come down by one, as in ADE20K")  # fmt: skip
    p.add_argument(
        "--loss", nargs="+", default=["cross-entropy"], type=loss_of, metavar="NAME[=WEIGHT]", help=LOSS_HELP
    )
    p.add_argument("--class-weights", nargs="+", default=[], metavar="W", help=WEIGHTS_HELP)
    p.add_argument("--augment", default="medium", choices=augment.NAMES, help=augment.HELP)
    p.add_argument("--head", default=None, help=HEAD_HELP)
    p.add_argument("--size", type=int, nargs=2, default=(240, 320), metavar=("H", "W"))
    native.options(p)
    channels.options(p)
    names.options(p)
    network.mask2former_options(p)
    queries.options(p)
    args = read(p, argv)
    if args.num_classes < 2:
        p.error(f"--num-classes {args.num_classes}: one class alone is always right, so nothing is learned; what is "
                "around it is a class too: --num-classes 2, without --reduce-zero-label")  # fmt: skip
    args.named = names.named(args)
    names.reading_of(args)  # an error, before anything is opened
    ways(args, batch_size=1)
    args.head = args.head or saved_head(args) or ("linear" if args.adapter in (["none"], ["linear"]) else "fpn")
    sides = makes_pyramid(args)
    queries.settle(p, args)
    if args.head == "linear" and sides:
        p.error(f"--head linear reads the tokens, so {sides[0]}'s pyramid would not be trained; use --head fpn")
    if args.head in network.BUILDERS:
        network.check_mask2former(p, args)
    if is_set(args.head) and (args.class_weights or args.loss != ["cross-entropy"]):
        p.error(f"--loss and --class-weights are for heads that say a class of each pixel; {args.head} brings a loss")
    try:
        args.class_weights = check_weights(args.class_weights, args.num_classes)
    except ValueError as error:
        p.error(str(error))
    if args.head == "upernet" and args.batch_size == 1:
        p.error("--head upernet pools each image to one value, and BatchNorm needs two: --batch-size 2 or more")
    return args


def is_set(head: str) -> bool:
    """Whether the head has a task of its own in ``semantic.py``."""
    return head in (*network.BUILDERS, queries.HEAD)


def build(args: argparse.Namespace) -> adaptkit.AdaptedModel:
    backbone = backbone_of(args)
    return adaptkit.attach(
        backbone,
        *adapters(args),
        head=(args.head, {"num_classes": args.num_classes}),
        train_backbone=trained_parts(backbone, args),
    ).train()


def data(args: argparse.Namespace, model: Any, train: bool) -> Rows:
    name, split, option = (args.train, "train", "--train") if train else (validation(args), "validation", "--val")
    columns = args.image_column, args.mask_column
    opened = open_dataset(name, split, columns, args.streaming, suffix=args.mask_suffix)
    if train:
        channels.settle(args, model.vit, opened, option)
    labels = names.reading_of(args)
    may_be = {"labels": labels, "classes": args.num_classes, "ignore": args.ignore_index}
    rows = SegmentationData(
        opened, args.size, source_of(model.vit, args), args.seed, train, **may_be, name=option, augment=args.augment
    )
    seen = check_labels(rows, args.num_classes, args.ignore_index, option, train=train)
    if train and args.class_weights == ["balanced"]:
        args.class_weights = balanced_weights(torch.from_numpy(seen.counts)).tolist()
    return rows if train else NativeSegmentation(rows)


def loss(model: nn.Module, batch: list[Tensor], args: argparse.Namespace) -> Tensor:
    """The sum of ``--loss``, each a mean over the pixels with a label; zero where a batch has none."""
    image, mask = batch
    logits = model(image).logits.float()
    weights = on_device(tuple(args.class_weights), logits.device) if args.class_weights else None
    terms = [(LOSSES[name], share) for name, share in map(named, args.loss)]
    return sum(share * term(logits, mask, args.ignore_index, weights) for term, share in terms)  # type: ignore[return-value]


@functools.lru_cache(maxsize=8)  # a copy to a GPU in each step would be waited for
def on_device(weights: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(weights, device=device)


def predict(model: nn.Module, batch: Any, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Images and masks at their own size -> the confusion matrix of each image (B, K, K)."""
    images, truth = batch
    found = masks(predictor(model, args), images)
    pairs = zip(found, truth)
    matrices = torch.stack([confusion(m, t.to(m.device), args.num_classes, args.ignore_index) for (m, _), t in pairs])
    return matrices, torch.zeros(len(matrices), device=matrices.device)


def predict_fully(model: nn.Module, batch: Any, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """As ``predict``, and of each image its boundaries and how sure its pixels were: (B, 2 K + 3 bins)."""
    images, truth = batch
    matrices, rows = [], []
    for (mask, confidence), true in zip(
        masks(predictor(model, args, Asked(ways(args), confidence=True)), images), truth
    ):
        one = extras(mask, true.to(mask.device), confidence, args.num_classes, args.ignore_index)
        matrices.append(one[0])
        rows.append(packed(*one[1:]))
    return torch.stack(matrices), torch.stack(rows)


def metric(args: argparse.Namespace) -> SemanticScores:
    return SemanticScores()


PERCENT = ("miou", "macc", "aacc")
TASK = Task("segment", "semantic-segmentation", "miou", PERCENT, build, data, loss, predict, metric,
            predict_fully=predict_fully)  # fmt: skip


def task(args: argparse.Namespace) -> Task:
    """What these options train."""
    return semantic.task(TASK, args.head) if is_set(args.head) else TASK


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    return run(task(args), args)


if __name__ == "__main__":
    command("segment", main)
