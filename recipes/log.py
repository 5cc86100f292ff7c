"""What a run says while it goes on, and how numbers are shown."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from io import FileIO
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from adaptkit.hub.write import write_atomic

EVERY = 10  # steps between two looks at the loss, each of which waits for the device


class Log:
    """A progress bar with loss, images/s and time left; metrics.jsonl; and the tracker of the user's choice."""

    def __init__(
        self, percent: tuple[str, ...], out: Path, accelerator: Accelerator, args: argparse.Namespace, first: int
    ) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.percent, self.accelerator, self.main = percent, accelerator, accelerator.is_main_process
        columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[say]}"))
        self.bar = Progress(*columns, TimeRemainingColumn(), disable=not self.main)
        self.row = self.bar.add_task("train", total=args.steps, completed=first, say="")
        self.bar.start()
        path = out / "metrics.jsonl"
        if first and self.main:
            forget_after(path, first)
        self.file = FileIO(path, "a" if first else "w") if self.main else None
        self.images, self.clock = 0, time.time()

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        if self.file is not None:
            append(self.file, row)
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def step(self, step: int, loss: Tensor, images: int, lr: float) -> None:
        """Count one step; every tenth is written, and the last."""
        self.images += images
        self.bar.advance(self.row)
        if step % EVERY and self.bar.tasks[0].remaining:
            return
        rate = self.images / (time.time() - self.clock)
        self.images, self.clock = 0, time.time()
        value = loss.item()
        self.bar.update(self.row, say=f"loss {value:.3f}  {rate:.1f} images/s")
        self.write({"step": step, "loss": value, "images_per_s": round(rate, 2), "lr": lr})

    def score(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of an evaluation."""
        self.bar.print(f"step {step}: {said(self.percent, metrics)}")
        self.write({"step": step, **metrics})
        self.images, self.clock = 0, time.time()

    def close(self) -> None:
        """Stop the bar and close the file."""
        self.bar.stop()
        if self.file is not None:
            self.file.close()


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
