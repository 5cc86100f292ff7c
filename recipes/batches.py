"""Which batches a process reads: of training in an order that the step decides, of validation its share of the set."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import islice
from typing import Any

from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from .devices import loading
from .order import Rows, Steps, Stream, shuffled
from .task import Task


def training_batches(rows: Any, first: int, task: Task, accelerator: Accelerator, args: argparse.Namespace) -> Iterable:
    """Return the batches of this rank from optimiser step ``first`` to the last, on its device."""
    k, world = args.accumulate, accelerator.num_processes
    if not args.streaming:
        order = Steps(len(rows), args.batch_size, first * k * world, args.steps * k * world, args.seed)
        collate = getattr(rows, "collate", task.collate)
        how = loading(accelerator.device, args.workers)
        loader = DataLoader(rows, batch_sampler=order, collate_fn=collate, **how)  # type: ignore[arg-type]
        return accelerator.prepare(loader)
    rows.data = shuffled(rows.data, args.seed, args.shuffle_buffer)
    stream = Stream(rows, args.batch_size, first * k, accelerator.process_index, world, args.workers)
    loader = DataLoader(stream, args.batch_size, collate_fn=task.collate, **loading(accelerator.device, args.workers))
    batches = islice(loader, (args.steps - first) * k)
    return (send_to_device(batch, accelerator.device, accelerator.non_blocking) for batch in batches)


class OwnShare(DataLoader):
    """Reads what this rank alone counts."""


def validation_batches(rows: Rows, task: Task, accelerator: Accelerator, args: argparse.Namespace) -> DataLoader:
    """Return the loader of this rank's share.

    A stream is read by the first rank, which deals it out; one of images of several sizes cannot be dealt out in
    batches, so there each rank reads its part. With ``--shard`` all ranks run each pass of the backbone together, and
    the number of passes depends on the sizes: there each reads all.
    """
    collate, how = getattr(rows, "collate", task.collate), loading(accelerator.device, args.workers)
    if getattr(args, "shard", False) and not args.streaming and hasattr(rows, "collate"):
        return OwnShare(rows, args.batch_size, collate_fn=collate, **how)
    if args.streaming and hasattr(rows, "collate"):
        rank, ranks = (0, 1) if args.shard else (accelerator.process_index, accelerator.num_processes)
        share = 0, rank, ranks, args.workers
        return OwnShare(
            Stream(rows, args.batch_size, *share, endless=False), args.batch_size, collate_fn=collate, **how
        )
    data: Any = Stream(rows, args.batch_size, workers=args.workers, endless=False) if args.streaming else rows
    return accelerator.prepare(DataLoader(data, args.batch_size, collate_fn=collate, **how))
