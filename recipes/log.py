"""What a run says while it goes on, and how numbers are shown."""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import time
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from adaptkit.hub.write import write_atomic

EVERY = 10  # steps between two looks at the loss, each of which waits for the device
PAUSE = 10.0  # seconds between two lines, where there is no terminal for a bar


class Log:
    """metrics.jsonl; loss, images/s and time left, as a bar or, where there is no terminal, as lines; and the tracker.

    A row of training has step, loss, images_per_s, lr, epoch (how many were seen), seconds (of the run until then, with
    what came before a resume), memory_mib, and epoch_seconds, what an epoch takes at this rate. A row of validation has
    step, the metrics, and seconds_to_score.
    """

    def __init__(
        self,
        percent: tuple[str, ...],
        out: Path,
        accelerator: Accelerator,
        args: argparse.Namespace,
        first: int,
        before: float = 0.0,
        epoch: int | None = None,
    ) -> None:
        """``before``: seconds until step ``first``, in earlier processes. ``epoch``: images in one, where known."""
        self.percent, self.accelerator, self.main = percent, accelerator, accelerator.is_main_process
        self.show: Bar | Lines = (Bar if self.main and at_terminal() else Lines)("train", args.steps, first, self.main)
        path = out / "metrics.jsonl"
        if first and self.main:
            forget_after(path, first)
        self.file = FileIO(path, "a" if first else "w") if self.main else None
        self.per_step = args.batch_size * accelerator.num_processes * args.accumulate
        self.steps, self.epoch, self.before, self.begun = args.steps, epoch, before, time.time()
        self.images, self.clock = 0, self.begun

    def seconds(self) -> float:
        """How long the run has taken until now."""
        return self.before + time.time() - self.begun

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        if self.file is not None:
            append(self.file, row)
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def step(self, step: int, loss: Tensor, lr: float) -> None:
        """Count one step; every tenth is written, and the last."""
        self.images += self.per_step
        if step % EVERY and step != self.steps:
            self.show.advance(step)
            return
        rate = self.images / (time.time() - self.clock)
        self.images, self.clock = 0, time.time()
        value = loss.item()
        self.show.advance(step, f"loss {value:.3f}  {rate:.1f} images/s  lr {lr:.2g}")
        row = {"step": step, "loss": value, "images_per_s": round(rate, 2), "lr": lr}
        if self.epoch:
            row |= {"epoch": round(step * self.per_step / self.epoch, 4), "epoch_seconds": round(self.epoch / rate, 2)}
        self.write({**row, "seconds": round(self.seconds(), 2), "memory_mib": round(peak_memory())})

    def validating(self, batches: Iterable[Any], total: int | None) -> Iterator[Any]:
        """Yield the batches of a validation, and show how many there were."""
        show = type(self.show)("validate", total, 0, self.main, self.show)
        try:
            for n, batch in enumerate(batches, 1):
                yield batch
                show.advance(n)
        finally:
            show.close()

    def score(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Write the metrics of an evaluation, which took so many seconds."""
        self.show.say(f"step {step}: {said(self.percent, metrics)}")
        self.write({"step": step, **metrics, "seconds_to_score": round(seconds, 2)})
        self.images, self.clock = 0, time.time()

    def close(self) -> None:
        """Stop the bar and close the file."""
        self.show.close()
        if self.file is not None:
            self.file.close()


class Bar:
    """A progress bar, in a terminal; one in another is a second row of it."""

    def __init__(
        self, name: str, total: int | None, first: int, main: bool = True, within: Bar | Lines | None = None
    ) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        said = TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[say]}")
        self.whole = not isinstance(within, Bar)
        self.bar = within.bar if isinstance(within, Bar) else Progress(*said, TimeRemainingColumn())
        self.row = self.bar.add_task(name, total=total, completed=first, say="")
        if self.whole:
            self.bar.start()

    def advance(self, done: int, text: str | None = None) -> None:
        """Show that so much is done, and a text."""
        self.bar.update(self.row, completed=done, **({} if text is None else {"say": text}))

    def say(self, line: str) -> None:
        """Print a line."""
        self.bar.print(line)

    def close(self) -> None:
        """End it."""
        self.bar.stop() if self.whole else self.bar.remove_task(self.row)


class Lines:
    """Lines, for a file: of training the first, the last and one in ten seconds; of a validation one in ten seconds."""

    def __init__(
        self, name: str, total: int | None, first: int, main: bool = True, within: Bar | Lines | None = None
    ) -> None:
        self.name, self.total, self.first, self.main, self.whole = name, total, first, main, within is None
        self.begun = time.time()
        self.last = self.begun - (PAUSE if self.whole else 0)

    def advance(self, done: int, text: str | None = None) -> None:
        """Print how far it is, if it is time."""
        now = time.time()
        if (self.whole and text is None) or (now - self.last < PAUSE and not (self.whole and done == self.total)):
            return
        self.last = now
        rate = (done - self.first) / max(now - self.begun, 1e-9)
        of, left = ("", "") if self.total is None else (f"/{self.total}", clock((self.total - done) / rate) + " left")
        self.say("  ".join(filter(None, (f"{self.name} {done}{of}", text, left))))

    def say(self, line: str) -> None:
        """Print a line."""
        if self.main:
            print(line, flush=True)

    def close(self) -> None:
        """There is nothing to end."""


def at_terminal() -> bool:
    """Whether someone looks: not where the output goes to a file, as under SLURM and nohup."""
    from rich.console import Console

    return Console().is_terminal


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def peak_memory() -> float:
    """Peak memory in MiB: of the GPU, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def append(file: FileIO, row: dict[str, Any]) -> None:
    """Write one line, whole or not at all; ``OSError`` names the file."""
    before, line = file.tell(), (json.dumps(row) + "\n").encode()
    try:
        while line:  # a disk takes what fits before it says that it is full
            line = line[file.write(line) :]
    except OSError as error:
        file.seek(before)
        file.truncate()
        raise OSError(error.errno, error.strerror or str(error), file.name) from error


def forget_after(path: Path, step: int) -> None:
    """Drop the rows that a killed run wrote after its last checkpoint; they come again."""
    kept = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # the last line may be half a line
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_atomic(path, "".join(kept).encode())


def shown(percent: tuple[str, ...], metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics as people read them: some in per cent."""
    return {k: round(100 * v, 2) if k in percent else round(v, 4) for k, v in metrics.items()}


def said(percent: tuple[str, ...], metrics: dict[str, float]) -> str:
    """Return them as one line."""
    return ", ".join(f"{k} {v:.2f}" if k in percent else f"{k} {v:.4f}" for k, v in shown(percent, metrics).items())
