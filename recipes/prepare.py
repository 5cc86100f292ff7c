"""What is there before the first step of a run: devices, model, data, the size of a batch, cached features."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

import adaptkit
from adaptkit.hub.write import check_writable

from .batches import validation_batches
from .cached import cached
from .checkpoints import newest, progress_of
from .devices import compile_adapted, copying, on_device, together
from .dry import fitting, wrapped
from .initial import initialise
from .options import precision
from .order import Rows, folded
from .summary import about
from .task import Task
from .trackers import check_tracker
from .windows import Windows


def start(task: Task, args: argparse.Namespace) -> tuple[Path, Accelerator]:
    """Return the folder, which can be written to, and the accelerator."""
    check_tracker(args.tracker)
    out = check_writable(args.out)
    made = together(
        Accelerator,
        mixed_precision=precision(args.mixed_precision),
        gradient_accumulation_steps=args.accumulate,
        log_with=args.tracker,
        project_dir=str(out),
        dataloader_config=copying(),
    )
    if made.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(
            f"this loop runs on one device or under DDP, and Accelerate is configured for "
            f"{made.distributed_type.value}, whose checkpoints hold the frozen backbone; choose MULTI_GPU, "
            "and --shard where the backbone does not fit one device"
        )
    if args.shard and made.num_processes == 1:
        raise ValueError("--shard puts the backbone in parts on several processes and this is one; start with torchrun")
    if args.tracker:
        made.init_trackers(f"adaptkit-{task.name}", config={k: str(v) for k, v in vars(args).items()})
    return out, made


class Prepared(NamedTuple):
    """What is there before the first step."""

    model: Any
    rows: Any  #: that are trained on, or the features of them
    data: tuple[Rows, Rows]  #: of training and validation, as they were opened
    val: DataLoader
    filling: float  #: seconds until the features were cached


def prepare(task: Task, args: argparse.Namespace, accelerator: Accelerator) -> Prepared:
    """Build the model, open the data, say what they are, find the batch size, and fill the cache of features."""
    model, train_rows, val_rows = opened(task, args)
    if accelerator.is_main_process:
        print(*about((train_rows, val_rows), args), sep="\n", flush=True)
    windows = Windows.of(args, train_rows, model)
    if args.batch_size == "auto":
        args.batch_size = batch_size(task, train_rows, windows, args, accelerator)
    val = validation_batches(val_rows, task, accelerator, args)
    started = time.time()
    if args.cache_features:
        rows = cached(train_rows, model, accelerator, args, windows)
    else:
        rows = wrapped(train_rows, windows, args)
    return Prepared(model, rows, (train_rows, val_rows), val, time.time() - started)


def opened(task: Task, args: argparse.Namespace) -> tuple[Any, Rows, Rows]:
    """Build the model and open the data, which are checked then; returns model, rows of training, and of validation."""
    set_seed(folded(args.seed, 31))
    model = task.build(args)
    initialise(model, args)
    return model, task.data(args, model, True), task.data(args, model, False)


def batch_size(
    task: Task, rows: Any, windows: Windows | None, args: argparse.Namespace, accelerator: Accelerator
) -> int:
    """Find ``--batch-size auto``; a run that goes on keeps what it began with."""
    if args.resume:
        found = progress_of(newest(Path(args.out)))["arguments"]["batch_size"]
        accelerator.print(f"--batch-size auto: {found} per process, as the run began")
        return found

    def build() -> Any:
        return placed(task.build(args), accelerator, args)

    found, said = fitting(task, build, wrapped(rows, windows, args), args, accelerator)
    accelerator.print(said)
    return found


def placed(model: Any, accelerator: Accelerator, args: argparse.Namespace) -> Any:
    """Put the model on its device, with ``--shard`` the frozen backbone in parts on all of them; ``--compile`` it."""
    model = on_device(model, accelerator, args)
    model = adaptkit.shard(model) if args.shard else model
    return compile_adapted(model, args.compile) if args.compile else model
