"""Ctrl-C and SIGTERM end a run after the step that it is in, with a checkpoint; while it waits for data, at once."""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import signal
import sys
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
        when = f"stopped after step {step}" if step else "stopped before the first step"
        if checkpoint is not None:
            where = f"checkpoint in {checkpoint}; go on with --resume"
        else:
            where = "this recipe keeps no checkpoint" if step else "there is nothing to go on with, start it again"
        super().__init__(f"{when}; {where}")
        self.status = 128 + number  # of the process, as a shell says it


class Asked(KeyboardInterrupt):
    """A signal came where all that a loop has finished is as it was after its last step. No ``Exception``, so that
    none who reads a picture takes it for an error of the picture."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class Stop:
    """While a loop runs, a signal is remembered; the second one ends the run at once."""

    def __init__(self) -> None:
        self.number = 0
        self.process = os.getpid()
        self.waits = False

    def __enter__(self) -> Stop:
        main = threading.current_thread() is threading.main_thread()  # others are told of no signal
        self.former = {number: signal.signal(number, self._ask) for number in SIGNALS} if main else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a process that this one made: Ctrl-C is its parent's business
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        if self.waits:
            raise Asked(number)
        os.write(2, b"\nstopping after this step, with a checkpoint; once more: at once, without\n")

    @contextlib.contextmanager
    def at_once(self, alone: bool = True) -> Iterator[None]:
        """Within, a signal raises :class:`Asked` where the program is; not where other processes wait for this one."""
        if alone and self.number:
            raise Asked(self.number)
        self.waits = alone
        try:
            yield
        finally:
            self.waits = False

    def batches(self, loader: Iterable[Any], alone: bool = True) -> Iterator[Any]:
        """Yield what a loader does; :class:`Asked` where a signal comes while it is waited for.

        Its workers may have got the signal too, and have ended, which is no error of theirs then.
        """
        batches = iter(loader)
        while True:
            try:
                with self.at_once(alone):
                    batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not self.number or not alone:
                    raise
                raise Asked(self.number) from error
            yield batch

    def heeding(self, loader: Iterable[Any], accelerator: Any) -> Iterator[Any]:
        """Yield what a loader of a validation does; :class:`Asked` between two batches where all are to stop."""
        for n, batch in enumerate(self.batches(loader, accelerator.num_processes == 1), 1):
            number = self.agreed(accelerator, n)
            if number:
                raise Asked(number)
            yield batch

    def agreed(self, accelerator: Any, done: int) -> int:
        """Return the signal after which all processes stop here, or 0.

        Several ask each other: after every step (or batch), but on GPUs, where the answer is waited for, after every
        tenth.
        """
        if accelerator.num_processes == 1:
            return self.number
        if accelerator.device.type != "cpu" and done % EVERY:
            return 0
        said = torch.tensor([self.number], device=accelerator.device)
        return int(accelerator.gather(said).max())


# ------------------------------------------------------------------------------------------- workers of a DataLoader

ENDED = getattr(signal, "SIGUSR2", None)  #: what a parent that ends says to its workers; not every system has it


def patient(worker: int) -> None:
    """Ignore, as a worker of a ``DataLoader``, the signals that are meant for the whole job, as SLURM sends them.

    The others of a run may need what it loads until all have agreed to stop. It ends with its parent: :func:`ends`.
    """
    if ENDED is not None:
        signal.signal(ENDED, lambda *_: os._exit(0))  # with this status it is no worker that was lost
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = functools.partial(_but_a_lost_parent, sys.excepthook)


def _but_a_lost_parent(hook: Any, kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Say nothing where the thread that hands over tensors finds the parent gone, which has said why it went."""
    if not issubclass(kind, EOFError | ConnectionError):
        hook(kind, error, trace)


@functools.cache
def ends() -> None:
    """See that workers end when this process does, by whatever error; Python's SIGTERM they ignore."""
    atexit.register(_dismiss, os.getpid())


def _dismiss(process: int) -> None:
    for child in multiprocessing.active_children() if os.getpid() == process else ():
        if ENDED is not None and child.daemon and child.pid is not None:
            os.kill(child.pid, ENDED)
