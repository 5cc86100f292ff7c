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
import math
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader

import adaptkit
from adaptkit.adapters.base import Adapter
from adaptkit.create import create_backbone
from adaptkit.hub.write import check_writable, write_atomic
from adaptkit.model.trained import TrainedBackbone

from .average import Average
from .cached import Views, cached
from .devices import compile_adapted, copying, loading, together
from .finite import Finite, checkpoints
from .folder import adopt, begin, check_run, occupied, run_of
from .log import EVERY, Log, said, shown
from .normalisation import to_record
from .options import precision
from .order import Rows, Steps, Stream, folded, plain_errors, shuffled
from .stopping import Stop, Stopped
from .windows import Windowed, Windows

# ---------------------------------------------------------------------------------------------------------- task


def save_adapted(model: Any, folder: Path, **metadata: Any) -> Path:
    """Write adapters and head."""
    return model.save(folder, **metadata)


def restore_adapted(model: Any, folder: Path) -> None:
    """Read back what ``save_adapted`` wrote."""
    model.load_adapter_state_dict(adaptkit.load(folder).tensors)


def attach_again(args: argparse.Namespace, folder: Path) -> nn.Module:
    """Attach what was saved to a fresh backbone."""
    return adaptkit.attach(create_backbone(args.backbone, pretrained=not args.random_backbone), folder)


@dataclass(frozen=True)
class Task:
    """What one recipe adds to the loop.

    A batch is what the ``DataLoader`` makes of samples, images first: its length is the number of images.
    """

    name: str  #: of the recipe
    kind: str  #: the Hub's name of the task, for the card
    score: str  #: which of the metrics is the result
    percent: tuple[str, ...]  #: metrics in 0..1 that people read as per cent
    build: Callable[[argparse.Namespace], Any]  #: -> the model to train
    data: Callable[[argparse.Namespace, Any, bool], Rows]  #: (args, model, train) -> samples
    loss: Callable[[nn.Module, Any, argparse.Namespace], Tensor]  #: (model, batch, args) -> scalar
    #: (model, batch, args) -> (prediction, target), an entry per image
    predict: Callable[[nn.Module, Any, argparse.Namespace], tuple[Any, Any]]
    metric: Callable[[argparse.Namespace], Any]  #: -> update(prediction, target), and compute() -> {name: number}
    ragged: bool = False  #: predictions and targets are lists, e.g. of boxes, an entry per image
    collate: Callable[[list[Any]], Any] | None = None
    save: Callable[..., Path] = save_adapted  #: (model, folder, **metadata)
    restore: Callable[[Any, Path], None] = restore_adapted
    again: Callable[[argparse.Namespace, Path], nn.Module] = attach_again


# --------------------------------------------------------------------------------------------------- optimisation


def parameter_groups(
    model: nn.Module, weight_decay: float, lr: float = 0.0, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """No weight decay on vectors: norms, biases, and gamma, which decay would hold at zero.

    ``layer_decay``: what is trained of the backbone learns by ``lr * layer_decay ** n``, n the blocks above it (Clark
    et al. 2020, ELECTRA, section 3.2; as BEiT and MAE are fine-tuned). Parts of adapters learn at the rates that their
    authors give them (``Adapter.learning_rates``).
    """
    above, factors = blocks_above(model), slower_parts(model)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        rate = factors.get(id(parameter), 1.0) * layer_decay ** above.get(id(parameter), 0)
        groups.setdefault((rate, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": p, "weight_decay": weight_decay if matrix else 0.0, **({} if rate == 1 else {"lr": lr * rate})}
        for (rate, matrix), p in groups.items()
    ]


def slower_parts(model: nn.Module) -> dict[int, float]:
    """Return by the id of a parameter its learning rate over that of the others, where an adapter says so."""
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    parts = ((adapter, name, rate) for adapter in adapters for name, rate in adapter.learning_rates.items())
    return {id(p): rate for adapter, name, rate in parts for p in adapter.get_submodule(name).parameters()}


def blocks_above(model: nn.Module) -> dict[int, int]:
    """Return by the id of a trained parameter of the backbone how many blocks stand above it."""
    found = {}
    for part in (m for m in model.modules() if isinstance(m, TrainedBackbone)):
        depth = part.spec.depth
        for name, parameter in part.copies.named_parameters():
            number = next((int(p) for p in name.split(".") if p.isdigit()), None)
            embeds = any(word in name for word in ("embed", "cls_token", "reg_token", "dist_token", "norm_pre"))
            found[id(parameter)] = depth if embeds else 0 if number is None else depth - 1 - number
    return found


def optimizer_of(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Return AdamW, or SGD with momentum as ViT is fine-tuned."""
    groups = parameter_groups(model, args.weight_decay, args.lr, args.layer_decay)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=args.lr)


def cosine(step: int, steps: int, warmup: float) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine to zero."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def linear(step: int, steps: int, warmup: float) -> float:
    """Learning-rate factor: linear warm-up, then linearly to zero (the poly schedule of power 1)."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else 1 - (step - rise) / max(1, steps - rise)


# ---------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, loader: DataLoader, accelerator: Accelerator, args: argparse.Namespace
) -> dict[str, float]:
    """Return the metrics over the whole set, each image counted once however many ranks share it.

    Metrics add up where the predictions are, so that a batch need not wait for the one before it. Entries per image
    go to the CPU, and so does all on a Mac's GPU, which has no float64.
    """
    metric, training = task.metric(args), model.training
    where = "cpu" if accelerator.device.type == "mps" else accelerator.device
    if isinstance(metric, nn.Module):  # one of torchmetrics; others add up where the tensors are that they are given
        metric.to(where)
    model.eval()
    for batch in loader:
        with accelerator.autocast():
            prediction, target = task.predict(model, batch, args)
        if task.ragged:
            pairs = accelerator.gather_for_metrics(list(zip(prediction, target)), use_gather_object=True)
            pairs = send_to_device(pairs, "cpu")
            metric.update([p for p, _ in pairs], [t for _, t in pairs])
        else:
            prediction, target = accelerator.gather_for_metrics((prediction, target))
            metric.update(prediction.to(where), target.to(where))
    model.train(training)
    return {name: float(value) for name, value in metric.compute().items()}


# ---------------------------------------------------------------------------------------------------- checkpoints


def keep_adapter_only(task: Task, accelerator: Accelerator) -> None:
    """Make ``save_state`` write adapter and head instead of the whole frozen backbone, and read them back."""

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            task.save(accelerator.unwrap_model(models[0]), Path(folder) / "adapter")

    def restore(models: list[nn.Module], folder: str) -> None:
        task.restore(accelerator.unwrap_model(models.pop()), Path(folder) / "adapter")

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(restore)


def save_checkpoint(accelerator: Accelerator, out: Path, step: int, args: argparse.Namespace) -> None:
    """Write beside, then rename: a kill leaves the last checkpoint whole. The newest two are kept.

    Raises ``OSError`` where it cannot be written, and leaves those that are there.
    """
    final = checkpoint_at(out, step)
    unfinished = final.with_suffix(".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed while it wrote
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(unfinished), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            progress = {
                "step": step, "run": run_of(out), "arguments": lasting(args, accelerator.num_processes)
            }  # fmt: skip
            write_atomic(unfinished / "progress.json", json.dumps(progress).encode())
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        shutil.rmtree(unfinished, ignore_errors=True)
        kept = [str(path) for path in checkpoints(out)[-1:]]
        raise OSError(
            f"the checkpoint {final} cannot be written: {error}. Make room, then go on with --resume"
            + (f" from {kept[0]}" if kept else "")
        ) from error
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
        for old in checkpoints(out)[:-2]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def checkpoint_at(out: Path, step: int) -> Path:
    """Return the folder of a checkpoint."""
    return out / "checkpoints" / f"step-{step:08d}"


def progress_of(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says of its run: step, name and arguments."""
    return json.loads((checkpoint / "progress.json").read_text())


def lasting(args: argparse.Namespace, processes: int) -> dict[str, Any]:
    """The arguments that a resumed run must share with the run it goes on with."""
    free = {"resume", "overwrite", "out", "config", "eval_every", "save_every", "tracker"} | (
        set() if args.streaming else {"workers"}
    )
    kept = {k: v for k, v in vars(args).items() if k not in free}
    return json.loads(json.dumps({**kept, "processes": processes}))


def resume_step(out: Path, args: argparse.Namespace, processes: int) -> tuple[Path | None, int]:
    """Return the newest checkpoint and its step; (None, 0) where there is none. Other arguments are an error."""
    found = checkpoints(out)
    if not found:
        return None, 0
    progress = progress_of(found[-1])
    check_run(found[-1], progress.get("run"), out)
    then, now = progress["arguments"], lasting(args, processes)
    changed = [k for k in now if then.get(k) != now[k]]
    if changed:
        raise ValueError(
            f"{found[-1]} was trained with {', '.join(f'{k}={then.get(k)!r}' for k in changed)}; now it is "
            f"{', '.join(f'{k}={now[k]!r}' for k in changed)}. Resume with the same arguments, or choose another --out"
        )
    return found[-1], progress["step"]


# ----------------------------------------------------------------------------------------------------------- loop


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


def validation_batches(rows: Rows, task: Task, accelerator: Accelerator, args: argparse.Namespace) -> DataLoader:
    """Return the loader of this rank's share; a stream is read by the first rank, which deals it out."""
    data: Any = Stream(rows, args.batch_size, workers=args.workers, endless=False) if args.streaming else rows
    collate = getattr(rows, "collate", task.collate)
    loader = DataLoader(data, args.batch_size, collate_fn=collate, **loading(accelerator.device, args.workers))
    return accelerator.prepare(loader)


def placed(model: Any, accelerator: Accelerator, args: argparse.Namespace) -> Any:
    """Put the model on its device, with ``--shard`` the frozen backbone in parts on all of them; ``--compile`` it."""
    model = model.to(accelerator.device)
    model = adaptkit.shard(model) if args.shard else model
    return compile_adapted(model, args.compile) if args.compile else model


def train(
    task: Task, model: Any, rows: Any, val: DataLoader, accelerator: Accelerator, args: argparse.Namespace
) -> tuple[dict[str, float], float]:
    """Train for ``--steps`` optimiser steps; returns the metrics and the seconds of training alone.

    With ``--ema`` the model has the average weights when this returns.
    """
    out, world, k = Path(args.out), accelerator.num_processes, args.accumulate
    checkpoint, first = resume_step(out, args, world) if args.resume else (None, 0)
    if accelerator.is_main_process:
        begin(out) if checkpoint is None else adopt(out, progress_of(checkpoint).get("run"))
    loader = training_batches(rows, first, task, accelerator, args)
    placed(model, accelerator, args)
    if isinstance(rows, Windowed):
        loader = rows.cached(loader, model)
    optimizer = optimizer_of(model, args)
    factor = {"cosine": cosine, "linear": linear}[args.schedule]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: factor(s // world, args.steps, args.warmup))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    trained = [p for p in model.parameters() if p.requires_grad]
    average = Average(trained, args.ema) if args.ema else None
    if average is not None:
        accelerator.register_for_checkpointing(average)
    keep_adapter_only(task, accelerator)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"resumed from {checkpoint}, step {first}")

    def averaged() -> Any:
        return contextlib.nullcontext() if average is None else average.applied()

    finite = Finite(accelerator, out)
    log, started = Log(task.percent, out, accelerator, args, first), time.time()
    with Stop() as stop:
        for i, batch in enumerate(stop.batches(loader)):
            step = first + i // k
            # Dropout belongs to the step, not to the run.
            set_seed(folded(args.seed * 1_000_003 + first * k + i, 31), device_specific=True)
            with accelerator.accumulate(model):
                loss = task.loss(model, batch, args)
                finite.see(step, loss)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, args.clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if (i + 1) % k:
                continue
            done = step + 1
            if average is not None:
                average.update(done)
            scores, saves = (n and done % n == 0 and done < args.steps for n in (args.eval_every, args.save_every))
            if scores or saves or done % EVERY == 0 or done == args.steps:
                finite.check(done)
            log.step(done, loss, args.batch_size * world * k, schedule.get_last_lr()[0])
            if scores:
                with averaged():
                    log.score(done, evaluate(task, model, val, accelerator, args))
            stopped = stop.agreed(accelerator, done)
            if stopped:
                finite.check(done)
            if saves or stopped:
                save_checkpoint(accelerator, out, done, args)
            if stopped:
                log.close()
                raise Stopped(done, checkpoint_at(out, done), stopped)
    seconds = time.time() - started
    if average is not None:
        average.settle()
    metrics = evaluate(task, model, val, accelerator, args)
    log.score(args.steps, metrics)
    log.close()
    return metrics, seconds


# ----------------------------------------------------------------------------------------------------------- main


def peak_memory() -> float:
    """Peak memory in MiB: of the GPU, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def start(task: Task, args: argparse.Namespace) -> tuple[Path, Accelerator]:
    """Return the folder, which can be written to, and the accelerator."""
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
    ``<score>_reattached``, seconds, memory, and sizes.
    """
    out, accelerator = start(task, args)
    with occupied(out, accelerator, args.resume, args.overwrite):
        return run_in(out, task, args, accelerator, last)


def run_in(out: Path, task: Task, args: argparse.Namespace, accelerator: Accelerator, last: bool) -> dict[str, Any]:
    """Do so in a folder that is this run's."""
    set_seed(folded(args.seed, 31))
    model = task.build(args)
    train_rows, val_rows = task.data(args, model, True), task.data(args, model, False)
    val = validation_batches(val_rows, task, accelerator, args)
    started = time.time()
    windows = Windows.of(args, train_rows, model)
    if args.cache_features:
        train_rows = cached(train_rows, model.to(accelerator.device), accelerator, args, windows)
    else:
        train_rows = Views(train_rows, args.views) if args.views else train_rows
        train_rows = Windowed(train_rows, windows) if windows else train_rows
    filling = time.time() - started
    metrics, seconds = train(task, model, train_rows, val, accelerator, args)

    memory, folder = peak_memory(), out / "adapter"
    if accelerator.is_main_process:
        size = args.size if isinstance(args.size, int) else list(args.size)
        task.save(model, folder, task=task.kind, size=size, **to_record(args), **metrics)
    accelerator.wait_for_everyone()
    set_seed(folded(args.seed, 31))  # a random backbone is the same random one
    again = placed(task.again(args, folder), accelerator, args)
    score, score_again = metrics[task.score], evaluate(task, again, val, accelerator, args)[task.score]
    result = {
        "adapter": " + ".join(args.adapter),
        "options": args.adapter_options,
        "head": getattr(args, "head", None),
        **shown(task.percent, metrics),
        f"{task.score}_reattached": shown(task.percent, {task.score: score_again})[task.score],
        "seconds": round(seconds, 1),
        **({"seconds_to_cache": round(filling, 1)} if args.cache_features else {}),
        "peak_memory_mib": round(memory),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "file_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
    }
    if accelerator.is_main_process:
        write_atomic(out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
        apart = "the same" if score_again == score else f"{abs(score_again - score):.2g} apart"
        both = said(task.percent, {task.score: score_again})
        print(f"saved {folder}; {said(task.percent, metrics)}; attached to a fresh backbone: {both}, {apart}")
        print(json.dumps(result))
    for tracker in accelerator.trackers:
        tracker.finish()
    if last:
        accelerator.end_training()
    return result
