"""Steps of training that are not the run's: what ``adaptkit plan`` measures, and how ``--batch-size auto`` decides.

On a GPU the batch is doubled until memory is short. On a CPU, where nothing fails before the machine pages, steps of
4 and of 8 images are run, and what the allocator gave at most in each is extended along a line::

    peak(batch) = fixed + batch * each

The batch is the largest power of two whose peak fits in half of the machine's memory: the process takes up to twice
what the allocator counts (1.6 and 1.9 times, measured), for memory is cut up, and libraries take some of their own.
Both count bytes, not seconds, so that a machine gives the same answer twice.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import nn
from torch.utils.data import default_collate

from adaptkit.model.offloading import bytes_of

from .cached import Views
from .optimising import optimizer_of
from .order import Steps, Stream
from .task import Task
from .windows import Windowed, Windows

PROBE = 4  # images in the smaller of two steps: with fewer, what does not grow with the batch hides what does
MOST = 256  # images in a batch that is chosen: above, a step is no faster and there are few of them
SHARE = 0.5  # of the machine's memory; of a GPU's FULL, which nobody else needs
FULL = 0.9


class Dry:
    """A model that takes steps on the training data, and is thrown away."""

    def __init__(
        self,
        task: Task,
        model: Any,
        rows: Any,
        args: argparse.Namespace,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        """``model`` is on its device; ``rows`` are of training, wrapped as in the run but for the cache."""
        self.task, self.model, self.rows, self.args, self.autocast = task, model.train(), rows, args, autocast
        self.device = next(model.parameters()).device
        self.optimizer = optimizer_of(model, args)
        self.trained = [p for p in model.parameters() if p.requires_grad]

    def read(self, number: int, size: int) -> Any:
        """Return the ``number``-th batch of this size, as the loader gives it."""
        if self.args.streaming:
            stream = iter(Stream(self.rows, size, number))
            samples = [next(stream) for _ in range(size)]
        else:
            keys = next(iter(Steps(len(self.rows), size, number, number + 1, self.args.seed)))
            samples = [self.rows[key] for key in keys]
        return self.batch(self.rows, samples)

    def batch(self, rows: Any, samples: list[Any]) -> Any:
        """Samples of these rows -> a batch on the device, as the loader makes it."""
        collate = getattr(rows, "collate", None) or self.task.collate or default_collate
        return send_to_device(collate(samples), self.device)

    def seen(self, batch: Any) -> Any:
        """Return what the model is trained on: with --cache-features or its windows what the backbone saw."""
        if isinstance(self.rows, Windowed):
            return next(iter(self.rows.cached([batch], self.model)))
        return (self.model.extract(batch[0]), *batch[1:]) if self.args.cache_features else batch

    def learn(self, batch: Any) -> None:
        """Go forward and backward once."""
        with self.autocast():
            loss = self.task.loss(self.model, batch, self.args)
        loss.backward()

    def finish(self) -> None:
        """Step the optimiser."""
        nn.utils.clip_grad_norm_(self.trained, self.args.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak(self, size: int, number: int = 0) -> int:
        """Return the most bytes of memory that a step of this batch takes, the model's own among them."""
        batch = self.seen(self.read(number, size))

        def step() -> None:
            self.learn(batch)
            self.finish()

        return peak_of(step, self.device) + (0 if self.device.type == "cuda" else bytes_of(self.model))


def wrapped(rows: Any, windows: Windows | None, args: argparse.Namespace) -> Any:
    """Return the rows as they are trained on, without a cache."""
    rows = Views(rows, args.views) if args.views else rows
    return Windowed(rows, windows) if windows else rows


# ------------------------------------------------------------------------------------------------------- memory


def peak_of(run: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that torch's allocator had given out at once during ``run``.

    On a GPU all there are, by its counter; on a CPU those that were asked for meanwhile, as the profiler logs them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it says on stderr that it starts, and that there is no GPU
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def machine_memory() -> int:
    """Return the bytes that this process may use: the machine's, or what its container is limited to."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            whole = min(whole, int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return whole


# -------------------------------------------------------------------------------------------------------- choice


def largest(fixed: float, each: float, memory: float, most: int) -> int:
    """Return the largest power of two, at least 1 and at most ``most``, with fixed + batch * each <= memory."""
    batch = 1
    while batch * 2 <= most and fixed + 2 * batch * each <= memory:
        batch *= 2
    return batch


def fitting(
    task: Task, build: Callable[[], Any], rows: Any, args: argparse.Namespace, accelerator: Accelerator
) -> tuple[int, str]:
    """Return the batch of ``--batch-size auto`` for each process, and a line that says how it was found.

    Args:
        task, args: of the run.
        build: makes a model to try with, on the device.
        rows: of training, wrapped as in the run.
        accelerator: of the run; all processes take the smallest of what they find.

    Raises ``ValueError`` where not even the smallest batch fits.
    """
    least = 2 if getattr(args, "head", None) == "upernet" else 1  # its BatchNorm sees one value of each image
    images = None if args.streaming else len(rows)
    most = MOST if images is None else max(least, min(MOST, images))
    with torch.random.fork_rng(devices=None if accelerator.device.type == "cuda" else []):
        dry = Dry(task, build(), rows, args, accelerator.autocast)
        found, why = (_on_gpu if dry.device.type == "cuda" else _on_cpu)(dry, least, most)
    del dry
    gc.collect()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    found = max(least, min(gather_object([found])))
    end = f", of {images} images" if found * 2 > most and images is not None and images < MOST else ""
    return found, f"--batch-size auto: {found} per process{end} ({why})"


def _on_cpu(dry: Dry, least: int, most: int) -> tuple[int, str]:
    memory = machine_memory() * SHARE / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    small = max(least, min(PROBE, most))
    dry.peak(small)  # makes the optimiser's state and fills pools
    low = dry.peak(small)
    fixed, each = 0.0, low / small
    if 2 * low <= memory and small < most:
        each = max(1.0, (dry.peak(2 * small) - low) / small)
        fixed = low - small * each
    found = max(least, largest(fixed, each, memory, most))
    return found, (
        f"about {(fixed + found * each) / 2**30:.2f} GiB, {each / 2**20:.0f} MiB an image; {memory / 2**30:.1f} GiB is "
        "half of this machine's memory for each process"
    )


def _on_gpu(dry: Dry, least: int, most: int) -> tuple[int, str]:
    total = torch.cuda.get_device_properties(dry.device).total_memory
    found, peak, batch = 0, 0, least
    while batch <= most:
        try:
            needed = dry.peak(batch)
        except torch.OutOfMemoryError:
            break
        if needed > FULL * total:
            break
        found, peak, batch = batch, needed, batch * 2
    if not found:
        raise ValueError(
            f"--batch-size auto: not even {least} fits the {total / 2**30:.0f} GiB of this GPU; a smaller --size or "
            "--mixed-precision bf16 takes less"
        )
    return found, f"{peak / 2**30:.2f} of {total / 2**30:.0f} GiB at most"
