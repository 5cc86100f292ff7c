"""The optimiser of what is trained, its groups, and the learning rate over the steps."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import nn

from adaptkit.adapters.base import Adapter
from adaptkit.core.tree import blocks_of
from adaptkit.model.adapted import AdaptedModel
from adaptkit.model.trained import TrainedBackbone

from .muon import Muon, matrices


def parameter_groups(
    model: nn.Module, weight_decay: float, lr: float = 0.0, layer_decay: float = 1.0, orthogonal: Set[int] = frozenset()
) -> list[dict[str, Any]]:
    """No weight decay on vectors: norms, biases, and gamma, which decay would hold at zero.

    ``layer_decay``: what is trained of the backbone learns by ``lr * layer_decay ** n``, n the blocks above it (Clark
    et al. 2020, ELECTRA, section 3.2; as BEiT and MAE are fine-tuned). Parts of adapters learn at the rates that their
    authors give them (``Adapter.learning_rates``). Parameters whose ids are in ``orthogonal`` have groups of their own,
    for :class:`~recipes.muon.Muon`.
    """
    above, factors = blocks_above(model), slower_parts(model)
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {(1.0, True, False): [], (1.0, False, False): []}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        rate = factors.get(id(parameter), 1.0) * layer_decay ** above.get(id(parameter), 0)
        groups.setdefault((rate, parameter.ndim > 1, id(parameter) in orthogonal), []).append(parameter)
    found: list[dict[str, Any]] = []
    for (rate, decays, muon), parameters in groups.items():
        found.append({"params": parameters, "weight_decay": weight_decay if decays else 0.0})
        found[-1] |= ({} if rate == 1 else {"lr": lr * rate}) | ({"orthogonal": True} if muon else {})
    return found


def slower_parts(model: nn.Module) -> dict[int, float]:
    """Return by the id of a parameter its learning rate over that of the others, where an adapter says so."""
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    parts = ((adapter, name, rate) for adapter in adapters for name, rate in adapter.learning_rates.items())
    return {id(p): rate for adapter, name, rate in parts for p in adapter.get_submodule(name).parameters()}


def blocks_above(model: nn.Module) -> dict[int, int]:
    """Return by the id of a trained parameter of the backbone how many blocks stand above it.

    What stands between two blocks (a stage's downsampling) goes with the first block of its stage.
    """
    found = {}
    for adapted in (m for m in model.modules() if isinstance(m, AdaptedModel)):
        vit, parts = adapted.vit, [m for m in adapted.modules() if isinstance(m, TrainedBackbone)]
        if not parts:
            continue
        blocks = blocks_of(vit.backbone, len(vit.spec.widths))
        index = {id(block): i for i, block in enumerate(blocks)}
        names = {name: index[id(m)] for name, m in vit.backbone.named_modules() if id(m) in index}
        for name, parameter in ((n, p) for part in parts for n, p in part.copies.named_parameters()):
            found[id(parameter)] = _above(name, names, len(blocks))
    return found


def _above(name: str, blocks: Mapping[str, int], depth: int) -> int:
    """How many of the blocks, given by their names, stand above the parameter of this name."""
    parents = [name.rsplit(".", k)[0] for k in range(1, name.count(".") + 1)]
    for parent in parents:
        if parent in blocks:
            return depth - 1 - blocks[parent]
    if any(word in name for word in ("embed", "cls_token", "reg_token", "dist_token", "norm_pre")):
        return depth
    stage = [i for parent in parents[:-1] for block, i in blocks.items() if block.startswith(f"{parent}.")]
    return depth - 1 - min(stage) if stage and len(stage) < depth else 0


def optimizer_of(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Return AdamW, Muon, or SGD with momentum as ViT is fine-tuned."""
    found = matrices(model) if args.optimizer == "muon" else set()
    groups = parameter_groups(model, args.weight_decay, args.lr, args.layer_decay, found)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.lr, momentum=0.9)
    return (Muon if args.optimizer == "muon" else torch.optim.AdamW)(groups, lr=args.lr)


def cosine(step: int, steps: int, warmup: float) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine to zero."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def linear(step: int, steps: int, warmup: float) -> float:
    """Learning-rate factor: linear warm-up, then linearly to zero (the poly schedule of power 1)."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else 1 - (step - rise) / max(1, steps - rise)


SCHEDULES = {"cosine": cosine, "linear": linear}


def schedule_of(
    optimizer: torch.optim.Optimizer, args: argparse.Namespace, processes: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule of ``--schedule``; Accelerate moves it by one for each process in a step."""
    factor = SCHEDULES[args.schedule]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: factor(s // processes, args.steps, args.warmup))


def as_asked(schedule: Any, optimizer: torch.optim.Optimizer, asked: list[tuple[float, float]]) -> None:
    """Give optimiser and schedule the rates that are asked for now, where a checkpoint brought those of then.

    Args:
        schedule: at the position of the checkpoint, with this run's factor.
        optimizer: with the moments of the checkpoint.
        asked: (peak learning rate, weight decay) of each group.
    """
    schedule.base_lrs = [rate for rate, _ in asked]
    for group, (rate, decay), factor in zip(optimizer.param_groups, asked, schedule.lr_lambdas):
        group["initial_lr"], group["weight_decay"] = rate, decay
        group["lr"] = rate * factor(schedule.last_epoch)
