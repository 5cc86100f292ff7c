"""The head "plain-mask" in the recipes: its options, its loss, and how its masks let go as training goes on."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import adaptkit
from adaptkit.heads.base import QueryHead

from .channels import backbone_of, trained_parts
from .options import adapters
from .task import Task, attach_again, restore_adapted

HEAD = "plain-mask"
OPTIONS_HELP = """of plain-mask, e.g. '{"num_blocks": 6, "interaction_indices": [2, 5, 8, 11]}'"""

Target = tuple[Tensor, Tensor]  #: masks (n, H, W) in 0..1 and labels (n,) of one image


def options(p: argparse.ArgumentParser) -> None:
    """Add ``--head-options``; ``--queries`` and ``--points`` are Mask2Former's too."""
    p.add_argument("--head-options", type=json.loads, default={}, metavar="JSON", help=OPTIONS_HELP)


def settle(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check the options; where ``--adapter`` was not given, this head has none, for it reads the backbone itself."""
    if not isinstance(args.head_options, dict):
        p.error(f"--head-options {args.head_options!r}: give a JSON object")
    if args.head != HEAD:
        if args.head_options:
            p.error(f"--head-options are of {HEAD}, and the head is {args.head}")
        return
    if args.adapter is p.get_default("adapter"):
        args.adapter = ["none"]
    if min(args.queries, args.points) < 1:
        p.error("--queries and --points must be at least 1")


def build(args: argparse.Namespace, classes: int, task: str, things: Sequence[int] = ()) -> adaptkit.AdaptedModel:
    """Attach it to a fresh backbone."""
    backbone = backbone_of(args)
    said = {"num_classes": classes, "task": task, "things": tuple(things), "num_q": args.queries, **args.head_options}
    return adaptkit.attach(
        backbone, *adapters(args), head=(HEAD, said), train_backbone=trained_parts(backbone, args)
    ).train()


def head_in(model: nn.Module) -> QueryHead | None:
    """The head of a model, whatever DDP has wrapped it in; None where it has another."""
    return next((m for m in model.modules() if isinstance(m, QueryHead)), None)


def task(base: Task, said: Callable[[], dict[str, Any]], **changes: Any) -> Task:
    """The task of a recipe with this head: of masks and labels, saved as adapters are, with what ``said`` returns."""

    def save(model: Any, folder: Path, **metadata: Any) -> Path:
        return model.save(folder, **said(), **metadata)

    files = {"save": save, "restore": restore_adapted, "again": attach_again}
    return dataclasses.replace(base, **{"loss": object_loss, **files, **changes})


def object_loss(model: nn.Module, batch: Any, args: argparse.Namespace) -> Tensor:
    """Of images and a dict of ``masks`` and ``labels`` for each."""
    images, targets = batch
    return loss(model, images, [(t["masks"], t["labels"]) for t in targets], args)


def loss(model: nn.Module, images: Any, targets: Sequence[Target], args: argparse.Namespace) -> Tensor:
    """The loss of images (B, C, H, W), or of what the backbone made of them."""
    head: Any = head_in(model)
    return head.loss(model(images), targets, args.points)
