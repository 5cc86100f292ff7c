"""The frozen classifier that AdaViT's recipe puts gates into."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import adaptkit
from adaptkit.create import create_backbone

from .labelled import Labelled
from .normalisation import source_of
from .optimising import cosine


def classifier(backbone: nn.Module, data: Labelled, args: argparse.Namespace, device: torch.device) -> Any:
    """Return a linear head trained on the frozen features."""
    config = adaptkit.ClassifierHeadConfig(len(data.classes), pool="avg")
    model = adaptkit.attach(backbone, head=config).to(device).eval()
    head: Any = model.head
    with torch.no_grad():
        order = torch.arange(len(data.labels))
        pooled = [head.pool(model(x)).float() for x, _ in data.batches(order, 128, source_of(model.vit, args), device)]
    features, labels = torch.cat(pooled), data.labels.to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2)
    for step in range(args.head_steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * cosine(step, args.head_steps, 0.05)
        chosen = torch.randint(len(labels), (256,), device=device)
        loss = F.cross_entropy(head.classifier(head.norm(features[chosen])), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.detach()
    return head


def build(data: Labelled, args: argparse.Namespace, device: torch.device) -> Any:
    """Return the frozen classifier with gates to be trained."""
    backbone = create_backbone(args.backbone)
    if args.head_steps == 0:
        return adaptkit.attach(backbone, ("adavit", args.options)).to(device).train()
    head = classifier(backbone, data, args, device)
    model: Any = adaptkit.attach(backbone, ("adavit", args.options), head=head.config)
    model.head.load_state_dict(head.state_dict())
    model.head.requires_grad_(False)
    return model.to(device).train()
