"""From the bytes of images to answers, within the limits: what the routes and the page both call."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adaptkit.predict.answers import Answer
from adaptkit.predict.tasks import Asked
from adaptkit.serve.allow import Allowed
from adaptkit.serve.limits import Gate, Limits, Refused, decoded, sizes_of
from adaptkit.serve.mounts import Mounted, Mounts
from adaptkit.serve.streams import Streams
from adaptkit.serve.worker import Worker

__all__ = ["Service"]

Answers = dict[str, Answer]


@dataclass
class Service:
    """What is mounted, the thread that runs it, and the limits."""

    mounts: Mounts
    worker: Worker
    limits: Limits = field(default_factory=Limits)
    allowed: Allowed = field(default_factory=Allowed)
    streams: Streams = field(default_factory=Streams)

    def __post_init__(self) -> None:
        self.gate = Gate(self.limits)

    async def answers(
        self, images: Sequence[bytes], tasks: Sequence[str], asked: Asked
    ) -> list[tuple[Tensor, Answers]]:
        """Files -> each picture (C, H, W) and its answers by task; :class:`Refused` where it may not be."""
        for name in tasks:
            self.mounts.of(name)
        channels = self.mounts.channels
        sizes = sizes_of(images, self.limits, channels)
        with self.gate.pixels(sum(sizes)):
            pictures = await asyncio.gather(*(asyncio.to_thread(decoded, data, channels) for data in images))
            futures: list[Future[Answers]] = []
            try:
                for picture in pictures:
                    self._check_sides(picture, tasks, asked)
                futures = [self.worker.submit(picture, tasks, asked) for picture in pictures]
                found = await asyncio.gather(*(asyncio.wrap_future(f) for f in futures))
            except BaseException as error:
                _cancel(futures)
                raise _as_refused(error) from error
        return list(zip(pictures, found))

    def _check_sides(self, picture: Tensor, tasks: Sequence[str], asked: Asked) -> None:
        """Raise :class:`Refused` (413) for a picture whose shorter side, brought to a task's, makes it too long."""
        height, width = picture.shape[-2:]
        for name in tasks:
            rows, columns = self.mounts.of(name).task(asked).sides(height, width)
            if rows * columns > self.limits.pixels:
                raise Refused(
                    413,
                    f"the image has {width} x {height} pixels (width x height), and task {name!r} makes it {columns} x "
                    f"{rows}; the limit is {self.limits.pixels:,} pixels: cut it",
                )

    def answer(self, image: bytes, task: str, asked: Asked) -> tuple[Tensor, Answer]:
        """Answer for one image and wait for it, from any thread."""
        with self.gate.request():
            [(picture, found)] = asyncio.run(self.answers([image], [task], asked))
        return picture, found[task]

    def mount(self, name: str, file: str) -> Mounted:
        """Mount a file on request. Raises :class:`Refused`: 403 where that may not be, 409 for a name that is taken,
        422 for what does not fit."""
        self.allowed.check(file)
        if name in self.mounts.all:
            raise Refused(409, f"{name!r} is mounted already, from {self.mounts.all[name].file}: DELETE it first")
        try:
            read = self.mounts.read(file)  # outside the worker: it may take long, and needs no model
            return self.worker.call(lambda: self.mounts.mount(name, file, read)).result()
        except (ValueError, TypeError, OSError, ImportError) as error:
            raise Refused(422, str(error)) from error

    def unmount(self, name: str) -> None:
        """Take an adapter off on request; :class:`Refused`: 403, or 404 for a name that is not there."""
        self.allowed.check()
        self.worker.call(lambda: self.mounts.unmount(name)).result()


def _cancel(futures: Sequence[Future[Any]]) -> None:
    for future in futures:
        future.cancel()


def _as_refused(error: BaseException) -> BaseException:
    """What a model says of an image that it cannot take is for the client to read."""
    return Refused(422, str(error)) if isinstance(error, ValueError | TypeError) else error
