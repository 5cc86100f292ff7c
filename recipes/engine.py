"""The training loop that the recipes share: one frozen backbone, small trained modules, one saved file.

A task plugs in its model, data, loss and metric (:class:`~recipes.task.Task`) and hands itself to :func:`run`, which
prepares (``prepare.py``), trains (:func:`train`, the loop itself), saves, and scores what was saved. The promises:

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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from adaptkit.hub.write import write_atomic

from . import final, names, queries, record
from .average import Average
from .batches import OwnShare, training_batches
from .best import best_of
from .checkpoints import (
    checkpoint_at,
    keep_adapter_only,
    newest,
    progress_of,
    restore_best,
    resume_step,
    save_checkpoint,
)
from .finite import Finite
from .folder import adopt, begin, occupied
from .log import EVERY, Log, peak_memory, said, shown
from .normalisation import to_record
from .optimising import as_asked, optimizer_of, schedule_of
from .order import folded, plain_errors
from .prepare import Prepared, placed, prepare, start
from .stopping import Asked, Stop, Stopped
from .task import Task
from .validation import computed, evaluate, measure
from .windows import Windowed

# ----------------------------------------------------------------------------------------------------------- loop


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
        # With --offload it is where it should be; None: as Accelerate would place it.
        place = [False if getattr(args, "offload", False) else None, None, None]
        prepared = accelerator.prepare(model, optimizer, schedule, device_placement=place)
        self.model, self.optimizer, self.schedule = prepared
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


# ------------------------------------------------------------------------------------------------- from start to end


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
