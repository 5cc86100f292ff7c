"""What a run would take, before it is started: ``adaptkit plan TASK ...`` with the options of the recipe.

The data are opened and checked, the model is built, and three steps are taken and thrown away. Nothing is written into
``--out`` or ``--cache-features``. The file is written into a temporary folder, to be weighed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from adaptkit.analysis import accounting
from adaptkit.core.near import hint
from adaptkit.core.packed import numel
from adaptkit.model.offloading import Offload, bytes_of, offloaded

from .cached import batches_at_once, kept_of
from .devices import together
from .dry import Dry, fitting, peak_of, wrapped
from .log import clock, peak_memory
from .options import precision
from .order import Rows, Stream
from .prepare import opened, placed
from .summary import about, as_json
from .task import Task
from .windows import Windows

RECIPES = ("segment", "classify", "depth", "detect", "panoptic")  #: those of the shared loop
STEPS = 3


def run(recipe: str, argv: list[str], in_json: bool = False) -> dict[str, Any]:
    """Plan a run and print it. Raises what the recipe itself raises, and ``ValueError`` for a recipe without plan."""
    if recipe not in RECIPES:
        raise ValueError(f"no plan for {recipe!r}{hint(recipe, RECIPES)}; there is one for {', '.join(RECIPES)}")
    module: Any = importlib.import_module(f".{recipe}", __package__)
    args = module.parse(argv)
    task: Task = module.task(args)
    accelerator = together(Accelerator, mixed_precision=precision(args.mixed_precision))
    if accelerator.num_processes > 1 or args.shard:
        raise ValueError("a plan is made by one process: leave out torchrun and --shard")
    found, lines = plan(task, args, accelerator)
    if in_json:
        print(json.dumps(found))
        sys.stdout.flush()
    else:
        print("\n".join([*lines, *shown(found)]))
    return found


def plan(task: Task, args: argparse.Namespace, accelerator: Accelerator) -> tuple[dict[str, Any], list[str]]:
    """Return what was measured, and the lines about the data."""
    model, train, val = opened(task, args)
    windows = Windows.of(args, train, model)
    rows, chosen = wrapped(train, windows, args), None
    if args.batch_size == "auto":
        args.batch_size, chosen = fitting(
            task, lambda: placed(task.build(args), accelerator, args), rows, args, accelerator
        )
    named = getattr(args, "named", {}).get("classes")
    found: dict[str, Any] = {
        "recipe": task.name,
        "device": str(accelerator.device),
        "data": [as_json(r.summary, args.size, named or r.summary.classes) for r in (train, val) if r.summary],
        "batch_size": args.batch_size,
        "batch_size_found": chosen,
        "parameters": sum(numel(p) for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "file_bytes": weighed(task, model, args),
    }
    dry = Dry(task, placed(model, accelerator, args), rows, args, accelerator.autocast)
    found["macs_per_image"] = macs(dry)
    if args.cache_features:
        found["cache"] = cache(dry, len(train))
    if (there := offloaded(dry.model)) is not None:
        found["offload"] = {"bytes": there.bytes(), "blocks": len(there.blocks), "largest_block_bytes": there.largest()}
    found.update(steps(dry))
    found.update(validation(dry, val))
    filling = found["cache"]["seconds"] if args.cache_features else 0.0
    found["steps"] = args.steps
    found["seconds"] = round(found["seconds_per_step"] * args.steps + filling, 1)
    if not args.streaming:
        found["epochs"] = args.steps * args.accumulate * args.batch_size / len(train)
    return found, about((train, val), args)


def weighed(task: Task, model: Any, args: argparse.Namespace) -> int:
    """Return the bytes of the file that the run would write."""
    with tempfile.TemporaryDirectory() as folder:
        task.save(model, Path(folder), task=task.kind)
        return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))


@torch.no_grad()
def macs(dry: Dry) -> float:
    """Return the multiply-accumulates of one image of the data in inference, its first as the run sees it."""
    batch, model = dry.read(0, 1), dry.model.eval()
    try:
        return accounting.counted(lambda: model(batch[0]))
    finally:
        model.train()


@torch.no_grad()
def cache(dry: Dry, images: int) -> dict[str, Any]:
    """Return the bytes of the features of all views, and the seconds to make them, from one batch."""
    args = dry.args
    image, target = dry.read(0, args.batch_size)[:2]
    there, cuda = offloaded(dry.model), dry.device.type == "cuda"
    peak = peak_of(lambda: dry.model.extract(image), dry.device) + (0 if cuda else there_of(dry.model, runs=True))
    started = time.perf_counter()
    seen = dry.model.extract(image)
    waited(dry.device)
    seconds = (time.perf_counter() - started) / len(image)
    if there is not None:  # each block is copied once for several such batches, whose tokens wait on the device
        copying, batches = copied(there, dry.device), batches_at_once(len(image))
        seconds += copying / (len(image) * batches) - copying / len(image)
        peak += (batches - 1) * (image.nbytes + seen.states[-1].nbytes)
    states = sum(t.numel() * t.element_size() for t in kept_of(seen, args.cache_dtype).values()) / len(image)
    one = target[0] if isinstance(target, Tensor) else torch.as_tensor(target[0])
    ids = one.dtype == torch.int64  # class ids take one byte each: see cached.compact
    samples = images * args.views
    kept = states + one.numel() * (1 if ids else one.element_size())
    return {
        "bytes": round(kept * samples),
        "samples": samples,
        "seconds": round(seconds * samples, 1),
        "peak_memory_bytes": peak,
    }


def copied(there: Offload, device: torch.device) -> float:
    """Return the seconds that all blocks take to the device."""
    waited(device)
    started = time.perf_counter()
    for index in range(len(there.blocks)):
        with there.held(index):
            pass
    waited(device)
    return time.perf_counter() - started


def there_of(model: Any, runs: bool) -> int:
    """Return the bytes of weights that a device would hold; of an offloaded backbone one block where it ``runs``."""
    there = offloaded(model)
    return bytes_of(model) - (0 if there is None else there.bytes() - runs * there.largest())


def steps(dry: Dry) -> dict[str, Any]:
    """Take one step to warm up, whose memory is counted, and three that are timed."""
    args, batch_size, cuda = dry.args, dry.args.batch_size, dry.device.type == "cuda"
    batch = dry.seen(dry.read(0, batch_size))

    def first() -> None:
        dry.learn(batch)
        dry.finish()

    peak = peak_of(first, dry.device) + (0 if cuda else there_of(dry.model, runs=not args.cache_features))
    del batch
    times, loading = [], []
    for step in range(STEPS):
        spent = 0.0
        for k in range(args.accumulate):
            started = time.perf_counter()
            batch = dry.read(step * args.accumulate + k, batch_size)
            waited(dry.device)
            loading.append(time.perf_counter() - started)
            batch = dry.seen(batch) if args.cache_features else batch
            waited(dry.device)
            started = time.perf_counter()
            dry.learn(batch if args.cache_features else dry.seen(batch))
            waited(dry.device)
            spent += time.perf_counter() - started
        started = time.perf_counter()
        dry.finish()
        waited(dry.device)
        times.append(spent + time.perf_counter() - started)
    compute, load = sum(times) / STEPS, sum(loading) / STEPS
    # Workers load beside the steps. Of cached features the images are made only where the adapter reads them.
    cached = bool(args.cache_features) and not dry.model.reads()[1]
    whole = max(compute, load / args.workers) if args.workers else compute + (0.0 if cached else load)
    return {
        "peak_memory_bytes": peak,
        "process_memory_bytes": round(peak_memory() * 2**20),
        "seconds_per_step": round(whole, 4),
        "seconds_to_load": round(load, 4),
        "seconds_of_steps": [round(t, 4) for t in times],
    }


@torch.no_grad()
def validation(dry: Dry, rows: Rows) -> dict[str, Any]:
    """Return the memory of one batch of validation: of the largest images, where the sizes of all are known."""
    args, count = dry.args, dry.args.batch_size
    if args.streaming:
        samples, which = list(islice(Stream(rows, count, endless=False), count)), "first"
    else:
        sizes = rows.summary.sizes if rows.summary else []
        numbers, which = list(range(len(rows))), "first"
        if len(sizes) == len(rows):
            numbers, which = sorted(numbers, key=lambda i: sizes[i][0] * sizes[i][1], reverse=True), "largest"
        samples = [rows[i] for i in numbers[:count]]
    batch, model = dry.batch(rows, samples), dry.model.eval()
    predict = (dry.task.predict_fully if args.details else None) or dry.task.predict
    with dry.autocast():
        peak = peak_of(lambda: predict(model, batch, args), dry.device)
    model.train()
    return {
        "validation_memory_bytes": peak + (0 if dry.device.type == "cuda" else there_of(model, runs=True)),
        "validation_images": f"the {which} {len(samples)}",
    }


def waited(device: torch.device) -> None:
    """Wait for a GPU to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --------------------------------------------------------------------------------------------------------- shown


def shown(found: dict[str, Any]) -> list[str]:
    """The plan in lines."""
    share = found["trained_parameters"] / found["parameters"]
    where = "of torch's allocator" if found["device"].startswith("cuda") else "of tensors, estimated from one step"
    lines = [
        f"plan {found['recipe']} on {found['device']}",
        f"     trained parameters  {found['trained_parameters']:,} of {found['parameters']:,} ({share:.2%})",
        f"     file                {sized(found['file_bytes'])}",
        f"     one image           {found['macs_per_image'] / 1e9:.2f} GMACs (inference)",
        f"     peak memory         {sized(found['peak_memory_bytes'])} {where}; this process took "
        f"{sized(found['process_memory_bytes'])}",
        f"     in validation       {sized(found['validation_memory_bytes'])} for {found['validation_images']} images "
        "at once",
    ]
    if "cache" in found:
        kept = found["cache"]
        lines.append(
            f"     cache               {sized(kept['bytes'])} for {kept['samples']:,} samples, filled in "
            f"{clock(kept['seconds'])}, peak memory {sized(kept['peak_memory_bytes'])}"
        )
    if "offload" in found:
        kept = found["offload"]
        lines.append(
            f"     in CPU memory       {kept['blocks']} blocks, {sized(kept['bytes'])}; one at a time is on the "
            f"device, {sized(kept['largest_block_bytes'])}, counted above where the backbone runs"
        )
    each = ", ".join(f"{t:.3f}" for t in found["seconds_of_steps"])
    epochs = f", {found['epochs']:.1f} epochs" if "epochs" in found else ""
    loading, total = f"{found['seconds_to_load']:.3f}", clock(found["seconds"])
    steps = f"{found['steps']:,} steps"
    return [
        *lines,
        f"     batch               {found['batch_size_found'] or found['batch_size']}",
        f"     a step              {found['seconds_per_step']:.3f} s (three took {each}, loading a batch {loading})",
        f"     {steps:20}{total}{epochs}; validation and checkpoints come on top",
    ]


def sized(count: float) -> str:
    """Bytes for people."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
