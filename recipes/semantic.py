"""Semantic segmentation by networks of transformers and by queries: `recipes/segment.py` with --head upernet,
mask2former or plain-mask.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

import adaptkit

from . import network, queries
from .channels import backbone_of, trained_parts
from .options import adapters
from .task import Task


def task(base: Task, head: str) -> Task:
    """The task of segmentation, with this network for a head, or with plain-mask."""
    if head == queries.HEAD:
        return dataclasses.replace(base, build=build_queries, loss=query_loss)
    loss = {"upernet": pixel_loss, "mask2former": set_loss}[head]
    files: dict[str, Any] = {"save": network.save, "restore": network.restore, "again": network.again}
    return dataclasses.replace(base, build=build, loss=loss, **files)


def build(args: argparse.Namespace) -> network.Network:
    backbone = backbone_of(args)
    words: dict[str, Any] = {"network": args.head, "categories": list(range(args.num_classes)), "width": args.width}
    more = {"ignore": args.ignore_index} if args.head == "upernet" else network.mask2former_recipe(args)
    return network.build(
        adaptkit.attach(backbone, *adapters(args), train_backbone=trained_parts(backbone, args)), {**words, **more}
    ).train()


def pixel_loss(model: nn.Module, batch: list[Tensor], args: argparse.Namespace) -> Tensor:
    """Cross entropy of each pixel, and 0.4 times that of the auxiliary head; zero where no pixel has a label."""
    image, mask = batch
    known = (mask != args.ignore_index).any()
    return model(image, labels=torch.where(known, mask, 0)).loss * known  # a mean over no pixel would be NaN


def set_loss(model: nn.Module, batch: list[Tensor], args: argparse.Namespace) -> Tensor:
    """Mask2Former's: each class in an image is one mask, matched with one query; zero where no pixel has a label."""
    image, mask = batch
    masks, labels = zip(*by_class(mask, args))
    found = model(image, mask_labels=list(masks), class_labels=list(labels)).loss
    return found.sum() * any(map(len, labels))


def build_queries(args: argparse.Namespace) -> adaptkit.AdaptedModel:
    return queries.build(args, args.num_classes, "semantic")


def query_loss(model: nn.Module, batch: list[Tensor], args: argparse.Namespace) -> Tensor:
    """PMT's, which is Mask2Former's: each class in an image is one mask; zero where no pixel has a label."""
    image, mask = batch
    targets = by_class(mask, args)
    return queries.loss(model, image, targets, args) * any(len(labels) for _, labels in targets)


def by_class(mask: Tensor, args: argparse.Namespace) -> list[queries.Target]:
    """Class ids (B, H, W) -> of each image a mask (n, H, W) and a label (n,) for each class that it shows."""
    ids = torch.where(mask == args.ignore_index, args.num_classes, mask).flatten(1)
    there = torch.zeros(len(ids), args.num_classes + 1, device=ids.device).scatter_(1, ids, 1.0)
    present = [row.nonzero().flatten().tolist() for row in there[:, :-1].cpu()]  # one question for the whole batch
    masks = [
        torch.stack([m == v for v in p]).float() if p else m.new_zeros(0, *m.shape).float()
        for m, p in zip(mask, present)
    ]
    labels = torch.tensor([v for p in present for v in p], dtype=torch.int64).to(mask.device)  # one copy
    return list(zip(masks, labels.split([len(p) for p in present])))
