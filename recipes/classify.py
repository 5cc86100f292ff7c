"""Image classification: a linear head, or an adapter with one, on a frozen ViT.

    python -m recipes.classify --train digits --size 64 --adapter linear
    python -m recipes.classify --train digits --size 64 --adapter lora --adapter-options '{"r": 8}'
    python -m recipes.classify --train imagenet/train --val imagenet/val --backbone vit_base_patch16_224 \
        --config imagenet1k-384                                   # ViT's fine-tuning at a higher resolution

Data: Parquet files, a folder with one folder per class, a list of images, a Hub id, or scikit-learn's digits.
`--size` is free: positions are resampled by the backbone's own rule. `--zero-head` starts the classifier at zero, as
ViT is fine-tuned (Dosovitskiy et al. 2021, section 3.2); there all weights are tuned, here those of the adapter.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import adaptkit
from adaptkit.hub.write import check_writable
from adaptkit.losses import check_budget, usage, usage_loss

from . import augment, channels
from . import names as class_names
from .channels import backbone_of, trained_parts
from .engine import run
from .labelled import LabelledData, check_same_classes, open_images
from .labels import warn_unseen
from .normalisation import source_of
from .options import adapters, command, makes_pyramid, parser, read, validation
from .scores.classification import ClassificationScores
from .summary import of_labels
from .task import Task

AUGMENT_HELP = """of training images: none, crop, flip (crops, mirrored too), or by name as in segment: light and
medium (mirrored crops; medium: colours, too), strong, trivial, rand, auto. All crop at least --least-crop"""


def add_options(p: argparse.ArgumentParser) -> None:
    """Add what is asked of one classification; `vtab` asks the same of each of its tasks."""
    p.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    p.add_argument("--augment", default="crop", choices=["none", "crop", "flip", *augment.NAMES[1:]], help=AUGMENT_HELP)
    p.add_argument("--least-crop", type=float, default=0.5, metavar="SHARE", help="of the image, at least")
    p.add_argument("--pool", default=None, choices=["avg", "token", "both"], help="default: both, avg without a token")
    p.add_argument("--zero-head", action=argparse.BooleanOptionalAction, default=False, help="start it at zero")
    p.add_argument("--label-smoothing", type=float, default=0.0)
    p.add_argument("--budget", type=float, default=0.5, help="share that each kind of adavit's gates keeps")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = parser("classify", __doc__, steps=600, batch_size=32)
    add_options(p)
    p.add_argument("--image-column", help="default: the only one, or the one named image")
    p.add_argument("--label-column", help="default: the first named label, labels, ...")
    p.add_argument("--num-classes", type=int, help="needed where a stream does not name them")
    class_names.options(p)
    channels.options(p)
    args = read(p, argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse what would train nothing."""
    check_budget(args.budget, "--budget")
    sides = makes_pyramid(args)
    if sides:
        raise ValueError(
            f"--adapter {sides[0]} makes a pyramid, and a classifier reads the tokens: what makes the maps would "
            "not be trained. Use linear, lora, metaformer, dat or adavit"
        )


def build(args: argparse.Namespace, rows: Any = None) -> adaptkit.AdaptedModel:
    backbone = backbone_of(args)
    if rows is not None:
        channels.settle(args, adaptkit.view(backbone), rows, "--train")
    source_of(adaptkit.view(backbone), args)  # known, or an error, before anything is built
    pool = args.pool or ("both" if getattr(adaptkit.view(backbone).spec, "num_prefix_tokens", 0) else "avg")
    head = adaptkit.ClassifierHeadConfig(args.num_classes, pool)
    model = adaptkit.attach(backbone, *adapters(args), head=head, train_backbone=trained_parts(backbone, args)).train()
    if args.zero_head:
        classifier: Any = model.head
        nn.init.zeros_(classifier.classifier.weight)
    return model


def loss(model: nn.Module, batch: list[Tensor], args: argparse.Namespace) -> Tensor:
    image, label = batch
    features = model(image)
    task = F.cross_entropy(features.logits.float(), label, label_smoothing=args.label_smoothing)
    return task + usage_loss(features.aux, args.budget) if usage(features.aux) else task


def predict(model: nn.Module, batch: list[Tensor], args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    image, label = batch
    return model(image).logits.float(), label


def metric(args: argparse.Namespace) -> ClassificationScores:
    return ClassificationScores(args.num_classes)


def task(args: argparse.Namespace) -> Task:
    """Open the data and count the classes, which ``args.num_classes`` then says."""
    columns = (args.image_column, args.label_column)
    train, names = open_images(args.train, "train", columns, args.streaming)
    val, val_names = open_images(validation(args), "validation", columns, args.streaming)
    args.num_classes = args.num_classes or max(len(names), len(val_names))
    if args.num_classes < 2:
        raise ValueError(f"{args.train} names {args.num_classes} classes; say how many there are with --num-classes")
    check_same_classes(names, val_names)
    most = max([max(d["label"]) for d in (train, val) if not args.streaming], default=0)
    if most >= args.num_classes:
        raise ValueError(f"a label is {most}, and --num-classes {args.num_classes} allows 0..{args.num_classes - 1}")
    args.named = class_names.named(args, names) if hasattr(args, "classes") else {}
    if not args.streaming:
        unseen = sorted(set(range(args.num_classes)) - set(train["label"]))
        called = [names[k] if k < len(names) else str(k) for k in unseen]
        warn_unseen(called, args.num_classes, "--train", f"{len(train)} images", "check --num-classes and --train")

    def built(args: argparse.Namespace) -> adaptkit.AdaptedModel:
        return build(args, train)

    def data(args: argparse.Namespace, model: Any, training: bool) -> LabelledData:
        rows = train if training else val
        known = {"classes": args.num_classes, "name": "--train" if training else "--val"}
        source = source_of(model.vit, args)
        made = LabelledData(rows, args.size, source, args.seed, args.augment, training, args.least_crop, **known)
        if not args.streaming:
            made.summary = of_labels(made.name, made, rows["label"][:], args.num_classes)
            made.summary.classes = list(args.named.get("classes") or names)
        return made

    return Task("classify", "image-classification", "top1", ("top1", "top5"), built, data, loss, predict, metric,
                native=False)  # fmt: skip


def fit(args: argparse.Namespace, last: bool = True) -> dict[str, Any]:
    """Train and evaluate; returns what result.json says."""
    check_writable(args.out)
    return run(task(args), args, last)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return fit(parse(argv))


if __name__ == "__main__":
    command("classify", main)
