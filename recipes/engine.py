"""The training loop that the recipes share: one frozen backbone, small trained modules, one saved file.

A task plugs in its model, data, loss and metric (:class:`Task`) and hands itself to :func:`run`. The promises:

* A run that was killed at any step and goes on with ``--resume`` ends byte for byte as if it had not been: data order,
  augmentation and dropout belong to the step alone (``order.py``), and a checkpoint holds adapter, head, optimiser,
  schedule, step and average.
* Checkpoints and files never hold the frozen backbone, are written by one rank, and are whole or absent.
* Each image is counted once in a score, however many ranks share the set.

Several processes: ``torchrun --nproc_per_node 4 -m recipes.segment ...`` or ``accelerate launch``, which is DDP: each
rank holds the frozen backbone once and exchanges the gradients of the adapter alone. With ``--shard`` the backbone lies
in parts on the ranks (FSDP2, ``adaptkit.shard``), for one that does not fit one device. FSDP as Accelerate configures
it saves the whole model in every checkpoint, so this loop refuses it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

import adaptkit
from adaptkit.hub.write import check_writable, write_atomic

from . import final, names, queries, record
from .average import Average
from .best import best_of
from .cached import Views, cached
from .checkpoints import (
    checkpoint_at,
    keep_adapter_only,
    newest,
    progress_of,
    restore_best,
    resume_step,
    save_checkpoint,
)
from .devices import compile_adapted, copying, loading, together
from .dry import fitting, wrapped
from .finite import Finite
from .folder import adopt, begin, occupied
from .initial import initialise
from .log import EVERY, Log, peak_memory, said, shown
from .normalisation import to_record
from .optimising import as_asked, optimizer_of, schedule_of
from .options import precision
from .order import Rows, Steps, Stream, folded, plain_errors, shuffled
from .stopping import Asked, Stop, Stopped
from .summary import about
from .task import Task
from .trackers import check_tracker
from .windows import Windowed, Windows

# ---------------------------------------------------------------------------------------------------- evaluation


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


# ------------------------------------------------------------------------------------------------------- batches


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


def share_statistics(model: nn.Module) -> None:
    """Give every rank the first one's buffers, which are saved: BatchNorm counts on each rank for itself.

    DDP does so at the start of its next forward, which scoring the module inside of it does not go through.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        for buffer in model.module.buffers():
            torch.distributed.broadcast(buffer, 0)


class OwnShare(DataLoader):
    """Reads what this rank alone counts."""


def validation_batches(rows: Rows, task: Task, accelerator: Accelerator, args: argparse.Namespace) -> DataLoader:
    """Return the loader of this rank's share.

    A stream is read by the first rank, which deals it out; one of images of several sizes cannot be dealt out in
    batches, so there each rank reads its part.
    """
    collate, how = getattr(rows, "collate", task.collate), loading(accelerator.device, args.workers)
    if args.streaming and hasattr(rows, "collate"):
        # With --shard all ranks run each pass of the backbone together, so that there each reads all.
        rank, ranks = (0, 1) if args.shard else (accelerator.process_index, accelerator.num_processes)
        share = 0, rank, ranks, args.workers
        return OwnShare(
            Stream(rows, args.batch_size, *share, endless=False), args.batch_size, collate_fn=collate, **how
        )
    data: Any = Stream(rows, args.batch_size, workers=args.workers, endless=False) if args.streaming else rows
    return accelerator.prepare(DataLoader(data, args.batch_size, collate_fn=collate, **how))


def placed(model: Any, accelerator: Accelerator, args: argparse.Namespace) -> Any:
    """Put the model on its device, with ``--shard`` the frozen backbone in parts on all of them; ``--compile`` it."""
    model = model.to(accelerator.device)
    model = adaptkit.shard(model) if args.shard else model
    return compile_adapted(model, args.compile) if args.compile else model


# ----------------------------------------------------------------------------------------------------------- loop


class Training:
    """What is trained, and how far it is. ``done``: steps that are finished."""

    def __init__(
        self, task: Task, model: Any, epoch: int | None, accelerator: Accelerator, args: argparse.Namespace, stop: Stop
    ) -> None:
        """Read the newest checkpoint with ``--resume``. ``model`` is on its device; ``epoch`` as in ``Log``."""
        self.task, self.accelerator, self.args, self.stop, self.out = task, accelerator, args, stop, Path(args.out)
        checkpoint, self.first = resume_step(self.out, args, accelerator.num_processes) if args.resume else (None, 0)
        self.done = self.saved = self.first
        optimizer = optimizer_of(model, args)
        schedule = schedule_of(optimizer, args, accelerator.num_processes)
        asked = [(rate, group["weight_decay"]) for rate, group in zip(schedule.base_lrs, optimizer.param_groups)]
        self.model, self.optimizer, self.schedule = accelerator.prepare(model, optimizer, schedule)
        self.query_head = queries.head_in(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.average = Average(self.trained, args.ema) if args.ema else None
        if self.average is not None:
            accelerator.register_for_checkpointing(self.average)
        keep_adapter_only(task, accelerator)
        self.best, self.metrics, before = best_of(task, args), {}, 0.0
        if checkpoint is not None:
            progress = progress_of(checkpoint)
            accelerator.load_state(str(checkpoint))
            as_asked(schedule, optimizer, asked)
            self.best.go_on(progress.get("best", {"scored": self.first}))
            self.metrics, before = progress.get("metrics", {}), progress.get("seconds", 0.0)
            if accelerator.is_main_process:
                restore_best(self.out, checkpoint)
            accelerator.print(f"resumed from {checkpoint}, step {self.first}")
        self.finite = Finite(accelerator, self.out)
        self.log = Log(task.percent, self.out, accelerator, args, self.first, before, epoch)

    def micro_step(self, i: int, batch: Any) -> Tensor:
        """Learn from one batch, the ``i``-th of this process; returns its loss. Every ``--accumulate``-th is a step."""
        args, k = self.args, self.args.accumulate
        # Dropout belongs to the step, not to the run.
        set_seed(folded(args.seed * 1_000_003 + self.first * k + i, 31), device_specific=True)
        if self.query_head is not None:
            self.query_head.anneal((self.first * k + i) / (args.steps * k))
        with self.accelerator.accumulate(self.model):
            loss = self.task.loss(self.model, batch, args)
            self.finite.see(self.first + i // k, loss)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.trained, args.clip)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        return loss

    def finish_step(self, done: int, loss: Tensor, val: DataLoader) -> None:
        """Count a step of the optimiser, and do what is due after it; ``Asked`` where the processes are to stop."""
        args, self.done = self.args, done
        if self.average is not None:
            self.average.update(done)
        scores, saves = self.is_due(args.eval_every, done), self.is_due(args.save_every, done)
        if scores or saves or done % EVERY == 0 or done == args.steps:
            self.finite.check(done)
        self.log.step(done, loss, self.schedule.get_last_lr()[0])
        if scores:
            self.score(val)
        number = self.stop.agreed(self.accelerator, done)
        if number:
            raise Asked(number)
        if saves:
            self.save()
        if self.best.exhausted:
            best = self.best
            self.log.show.say(
                f"no {best.metric} better than that of step {best.step} in {best.since} evaluations: ends"
            )

    def is_due(self, every: int, step: int) -> bool:
        """Whether something is to be done every so many steps, 0 for never; after the last it is done anyway."""
        return bool(every) and step > 0 and step % every == 0 and step < self.args.steps

    def averaged(self) -> Any:
        """Within, the model has the weights that are scored and saved: with ``--ema`` the average ones."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def score(self, val: DataLoader) -> None:
        """Evaluate, write it down, and keep the adapter where it is the best so far."""
        started = time.time()
        with self.averaged():
            self.metrics = evaluate(self.task, self.model, val, self.accelerator, self.args, self.heeding)
            if self.best.see(self.done, self.metrics) and self.accelerator.is_main_process:
                self.write(self.out / "best", step=self.done)
        self.log.score(self.done, self.metrics, time.time() - started)

    def heeding(self, loader: Any) -> Iterable[Any]:
        """The batches of a validation, shown as they come; ``Asked`` where the processes are to stop.

        Those that read shares of their own read different numbers of batches, and agree on a stop after them.
        """
        total = None if self.args.streaming else len(loader)
        if isinstance(loader, OwnShare) and self.accelerator.num_processes > 1:
            return self.log.validating(loader, total)
        return self.stop.heeding(self.log.validating(loader, total), self.accelerator)

    def write(self, folder: Path, **more: Any) -> None:
        """Write the adapter file, with the metrics in it."""
        size = self.args.size if isinstance(self.args.size, int) else list(self.args.size)
        model = self.accelerator.unwrap_model(self.model)
        said = {**to_record(self.args, model.vit.spec.channels), **names.to_record(self.args), **more, **self.metrics}
        self.task.save(model, folder, task=self.task.kind, size=size, **said)

    def save(self) -> None:
        """Write a checkpoint."""
        more = {"best": self.best.state(), "metrics": self.metrics, "seconds": self.log.seconds()}
        save_checkpoint(self.accelerator, self.out, self.done, self.args, more)
        self.saved = self.done

    def leave(self, number: int) -> Stopped:
        """Write a checkpoint, unless there is one, and return what to raise after this signal."""
        if self.done > self.saved:
            self.finite.check(self.done)
            self.save()
        self.log.close()
        return Stopped(self.done, checkpoint_at(self.out, self.done) if self.done else None, number)


def train(
    task: Task, model: Any, rows: Any, val: DataLoader, accelerator: Accelerator, args: argparse.Namespace, stop: Stop
) -> tuple[Training, float]:
    """Train for ``--steps`` optimiser steps, or until ``--patience`` ends it, and score; also returns the seconds.

    Raises ``Stopped`` after a signal, with a checkpoint of the last step that was finished.
    """
    epoch = None if args.streaming else len(rows)
    run = Training(task, placed(model, accelerator, args), epoch, accelerator, args, stop)
    loader = training_batches(rows, run.first, task, accelerator, args)
    loader = rows.cached(loader, model) if isinstance(rows, Windowed) else loader
    try:
        if run.is_due(args.eval_every, run.first) and run.best.scored < run.first:
            run.score(val)  # a signal had broken it off
        batches = () if run.best.exhausted else stop.batches(loader, accelerator.num_processes == 1)
        for i, batch in enumerate(batches):
            loss = run.micro_step(i, batch)
            if (i + 1) % args.accumulate == 0:
                run.finish_step(run.first + (i + 1) // args.accumulate, loss, val)
            if run.best.exhausted:
                break
        seconds = run.log.seconds()
        if not (run.best.exhausted and run.metrics):
            run.score(val)
        return run, seconds
    except Asked as asked:
        raise run.leave(asked.number) from None
    except BaseException:
        run.log.close()
        raise


# ----------------------------------------------------------------------------------------------------------- main


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


@plain_errors()
def run(task: Task, args: argparse.Namespace, last: bool = True) -> dict[str, Any]:
    """Train, save, attach what was saved to a fresh backbone, and see that the score is the same.

    Unless it is the ``last`` run of this process, its ranks stay connected.

    Returns what result.json says: the metrics as people read them, the score of the attached file under
    ``<score>_reattached``, seconds, memory, sizes, the digest of the file, and the best evaluation.
    """
    out, accelerator = start(task, args)
    with occupied(out, accelerator, args.resume, args.overwrite), Stop() as stop:
        try:
            with stop.at_once():
                best_of(task, args)  # an error, before anything is loaded
                there = newest(out) if args.resume else None
                prepared = prepare(task, args, accelerator)
                describe(task, out, args, accelerator, prepared)
        except Asked as asked:
            step = progress_of(there)["step"] if there else 0
            raise Stopped(step, there, asked.number) from None
        return finish(task, args, accelerator, prepared, stop, last)


class Prepared(NamedTuple):
    """What is there before the first step."""

    model: Any
    rows: Any  #: that are trained on, or the features of them
    data: tuple[Rows, Rows]  #: of training and validation, as they were opened
    val: DataLoader
    filling: float  #: seconds until the features were cached


def prepare(task: Task, args: argparse.Namespace, accelerator: Accelerator) -> Prepared:
    """Build the model and open the data, which are checked then; fill the cache of features."""
    set_seed(folded(args.seed, 31))
    model = task.build(args)
    initialise(model, args)
    train_rows, val_rows = task.data(args, model, True), task.data(args, model, False)
    if accelerator.is_main_process:
        print(*about((train_rows, val_rows), args), sep="\n", flush=True)
    windows = Windows.of(args, train_rows, model)
    if args.batch_size == "auto":
        args.batch_size = batch_size(task, train_rows, windows, args, accelerator)
    val = validation_batches(val_rows, task, accelerator, args)
    started = time.time()
    rows: Any = train_rows
    if args.cache_features:
        rows = cached(train_rows, model.to(accelerator.device), accelerator, args, windows)
    else:
        rows = Views(rows, args.views) if args.views else rows
        rows = Windowed(rows, windows) if windows else rows
    return Prepared(model, rows, (train_rows, val_rows), val, time.time() - started)


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


def describe(task: Task, out: Path, args: argparse.Namespace, accelerator: Accelerator, prepared: Prepared) -> None:
    """Make the folder this run's, or see that it is, and write ``config.yaml``."""
    checkpoint, _ = resume_step(out, args, accelerator.num_processes) if args.resume else (None, 0)
    if accelerator.is_main_process:
        begin(out) if checkpoint is None else adopt(out, progress_of(checkpoint).get("run"))
        record.write(out, task.name, args, accelerator, prepared.model, prepared.data)


def finish(
    task: Task, args: argparse.Namespace, accelerator: Accelerator, prepared: Prepared, stop: Stop, last: bool
) -> dict[str, Any]:
    """Train, save, and score what was saved."""
    run, seconds = train(task, prepared.model, prepared.rows, prepared.val, accelerator, args, stop)
    memory, folder = peak_memory(), run.out / "adapter"
    with run.averaged():
        if accelerator.is_main_process:
            run.write(folder)
    accelerator.wait_for_everyone()
    set_seed(folded(args.seed, 31))  # a random backbone is the same random one
    again = placed(task.again(args, folder), accelerator, args)
    try:
        last_look = measure(task, again, prepared.val, accelerator, args, run.heeding, fully=args.details)
    except Asked as asked:
        raise run.leave(asked.number) from None
    run.log.close()
    metrics, found = run.metrics, computed(last_look)
    score, score_again = metrics[task.score], found[task.score]
    result = {
        "adapter": " + ".join(args.adapter),
        "options": args.adapter_options,
        "head": getattr(args, "head", None),
        **shown(task.percent, metrics),
        f"{task.score}_reattached": shown(task.percent, {task.score: score_again})[task.score],
        "steps": run.done,
        "seconds": round(seconds, 1),
        **({"seconds_to_cache": round(prepared.filling, 1)} if args.cache_features else {}),
        "peak_memory_mib": round(memory),
        "trained_parameters": sum(p.numel() for p in run.trained),
        **final.costs(again, args),
        "file_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "file_sha256": record.digest(folder / record.WEIGHTS),
        **({"best": {k: run.best.state()[k] for k in ("metric", "step", "value")}} if run.best.metric else {}),
    }
    if accelerator.is_main_process:
        write_atomic(run.out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
        if args.details:
            final.write(task, run.out, again, last_look, prepared.data[1], args)
        apart = "the same" if score_again == score else f"{abs(score_again - score):.2g} apart"
        both = said(task.percent, {task.score: score_again})
        print(f"saved {folder}; {said(task.percent, metrics)}; attached to a fresh backbone: {both}, {apart}")
        print(json.dumps(result))
    for tracker in accelerator.trackers:
        tracker.finish()
    if last:
        accelerator.end_training()
    return result
