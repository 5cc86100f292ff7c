"""A look at the validation set: predictions and truth of all processes, into one metric."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import nn
from torch.utils.data import DataLoader

from .batches import OwnShare
from .task import Task


def evaluate(
    task: Task,
    model: nn.Module,
    loader: DataLoader,
    accelerator: Accelerator,
    args: argparse.Namespace,
    through: Callable[[Any], Iterable[Any]] = iter,
) -> dict[str, float]:
    """Return the metrics over the whole set: what :func:`measure` counted."""
    return computed(measure(task, model, loader, accelerator, args, through))


def computed(metric: Any) -> dict[str, float]:
    """Return what a metric says."""
    return {name: float(value) for name, value in metric.compute().items()}


@torch.no_grad()
def measure(
    task: Task,
    model: nn.Module,
    loader: DataLoader,
    accelerator: Accelerator,
    args: argparse.Namespace,
    through: Callable[[Any], Iterable[Any]] = iter,
    fully: bool = False,
) -> Any:
    """Return the metric over the whole set, each image counted once however many ranks share it.

    Metrics add up where the predictions are, so that a batch need not wait for the one before it. Entries per image
    go to the CPU, and so does all on a Mac's GPU, which has no float64. ``through`` yields the batches of the loader,
    and may show how many there were, or break off. Where each rank reads a share of its own, the metrics are joined.
    ``fully`` looks as the record at the end of a run wants it (``Task.predict_fully``).
    """
    predict = (task.predict_fully if fully else None) or task.predict
    own = isinstance(loader, OwnShare)
    share_statistics(model)
    metric, training = task.metric(args), model.training
    where = "cpu" if accelerator.device.type == "mps" else accelerator.device
    if isinstance(metric, nn.Module):  # one of torchmetrics; others add up where the tensors are that they are given
        metric.to(where)
    model.eval()
    for batch in through(loader):
        with accelerator.autocast():
            prediction, target = predict(model, batch, args)
        if task.ragged:
            pairs = accelerator.gather_for_metrics(list(zip(prediction, target)), use_gather_object=True)
            pairs = send_to_device(pairs, "cpu")
            metric.update([p for p, _ in pairs], [t for _, t in pairs])
        else:
            if not own:
                prediction, target = accelerator.gather_for_metrics((prediction, target))
            metric.update(prediction.to(where), target.to(where))
    model.train(training)
    if own:
        parts = gather_object([metric])
        metric.join(parts[:1] if args.shard else parts)
    return metric


def share_statistics(model: nn.Module) -> None:
    """Give every rank the first one's buffers, which are saved: BatchNorm counts on each rank for itself.

    DDP does so at the start of its next forward, which scoring the module inside of it does not go through.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        for buffer in model.module.buffers():
            torch.distributed.broadcast(buffer, 0)
