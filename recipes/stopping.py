"""Ctrl-C and SIGTERM end a run after the step that it is in, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .log import EVERY

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop has; the text says where it can be gone on with."""

    def __init__(self, step: int, checkpoint: Path | None, number: int) -> None:
        where = f"checkpoint in {checkpoint}; go on with --resume" if checkpoint else "this recipe keeps no checkpoint"
        super().__init__(f"stopped after step {step}; {where}")
        self.status = 128 + number  # of the process, as a shell says it


class Stop:
    """While a loop runs, a signal is remembered; the second one ends the run at once."""

    def __init__(self) -> None:
        self.number = 0
        self.process = os.getpid()

    def __enter__(self) -> Stop:
        main = threading.current_thread() is threading.main_thread()  # others are told of no signal
        self.former = {number: signal.signal(number, self._ask) for number in SIGNALS} if main else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a worker of a DataLoader: Ctrl-C is its parent's business
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        os.write(2, b"\nstopping after this step, with a checkpoint; once more: at once, without\n")

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yield what a loader does. Its workers may have got the signal too, and have ended."""
        try:
            yield from loader
        except RuntimeError:
            if not self.number:
                raise

    def agreed(self, accelerator: Any, done: int) -> int:
        """Return the signal after which all processes stop here, or 0.

        Several ask each other at every tenth step, for on a GPU the answer is waited for.
        """
        if accelerator.num_processes == 1:
            return self.number
        if done % EVERY:
            return 0
        said = torch.tensor([self.number], device=accelerator.device)
        return int(accelerator.gather(said).max())
