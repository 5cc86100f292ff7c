"""The one thread that owns the model: images wait in a queue, and those that wait together are answered together."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptkit.ops.forks import Lock
from adaptkit.predict.answers import Answer
from adaptkit.predict.tasks import Asked
from adaptkit.serve.limits import Refused
from adaptkit.serve.mounts import Mounts

__all__ = ["Job", "Worker"]

log = logging.getLogger("adaptkit.serve")


@dataclass
class Job:
    """An image and the tasks to answer for it."""

    image: Tensor  #: (C, H, W) in 0..1
    tasks: Sequence[str]
    asked: Asked
    future: Future[dict[str, Answer]] = field(default_factory=Future)


@dataclass
class _Call:
    run: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)


class Worker:
    """Runs jobs of a queue until it is stopped.

    Args:
        mounts: what it runs; nobody else may.
        window: seconds that the first image of a batch waits for others. While the model is busy they gather by
            themselves, so that a short window does.
        most: images of a batch.
    """

    def __init__(self, mounts: Mounts, window: float = 0.002, most: int = 8) -> None:
        if window < 0 or most < 1:
            raise ValueError(f"window={window}, most={most}: give at least 0 seconds and 1 image")
        self.mounts, self.window, self.most = mounts, window, most
        self._queue: queue.SimpleQueue[Job | _Call | None] = queue.SimpleQueue()
        self._left: list[_Call | None] = []  # what ended a batch
        self._lock, self._closed = Lock(), False
        self._thread = threading.Thread(target=self._loop, name="adaptkit-serve", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether it takes jobs."""
        return not self._closed and self._thread.is_alive()

    def submit(self, image: Tensor, tasks: Sequence[str], asked: Asked) -> Future[dict[str, Answer]]:
        """Queue an image; the future has the answers by task, or :class:`Refused`. ``Refused`` (503) once stopped."""
        return self._put(Job(image, tasks, asked)).future

    def call(self, run: Callable[[], Any]) -> Future[Any]:
        """Queue a function that changes what is mounted: it runs between two batches."""
        return self._put(_Call(run)).future

    def stop(self) -> None:
        """Take nothing more, finish what is queued, and end."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _put(self, item: Any) -> Any:
        with self._lock:
            if not self.is_ready:
                raise Refused(503, "the server is stopping")
            self._queue.put(item)
        return item

    # -------------------------------------------------------------------------------------------- in the thread itself

    def _loop(self) -> None:
        while (item := self._left.pop() if self._left else self._queue.get()) is not None:
            if isinstance(item, _Call):
                _finish(item.future, item.run)
            else:
                self._answer(self._gathered(item))

    def _gathered(self, first: Job) -> list[Job]:
        """Wait for others, up to the window; what is no image ends the batch, and comes next."""
        batch, until = [first], time.monotonic() + self.window
        while len(batch) < self.most:
            try:
                item = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if not isinstance(item, Job):
                self._left.append(item)
                break
            batch.append(item)
        return batch

    def _answer(self, batch: list[Job]) -> None:
        batch = [job for job in batch if job.future.set_running_or_notify_cancel()]
        passes, metrics = self.mounts.passes, self.mounts.metrics
        metrics.waiting.set(self._queue.qsize())
        if not batch:
            return
        metrics.images.observe(len(batch))
        with torch.no_grad():
            try:
                if len(batch) > 1:
                    passes.ahead(self._ahead(batch))
            except Exception:  # memory, for instance: alone each may do, and says it where not
                log.exception("a batch of %d images failed: they run one by one", len(batch))
                passes.forget()
            for job in batch:
                _finish(job.future, partial(self._answers, job), started=True)
        passes.forget()

    def _ahead(self, batch: list[Job]) -> list[Tensor]:
        wanted = [(self.mounts.all[name], job) for job in batch for name in job.tasks if name in self.mounts.all]
        made = [mounted.ahead(job.image, job.asked) for mounted, job in wanted]
        return [image for image in made if image is not None]

    def _answers(self, job: Job) -> dict[str, Answer]:
        answers = {}
        for name in job.tasks:
            mounted = self.mounts.of(name)
            answers[name] = mounted.answer(job.image, job.asked)
            if mounted.why_alone:
                self.mounts.metrics.ran("alone", 1)
        return answers


def _finish(future: Future[Any], run: Callable[[], Any], started: bool = False) -> None:
    if not started and not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(run())
    except BaseException as error:
        future.set_exception(error)
