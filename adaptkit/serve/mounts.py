"""Adapters by name on one resident backbone, put on and taken off while it serves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adaptkit.core.tree import at_rest, skeleton
from adaptkit.core.view import Features
from adaptkit.hub.file import AdapterFile
from adaptkit.hub.repository import load
from adaptkit.model.adapted import attach
from adaptkit.model.described import describe
from adaptkit.model.many import ManyTasks
from adaptkit.model.owner import mark_shared
from adaptkit.networks import network
from adaptkit.predict.answers import Answer
from adaptkit.predict.predicts import Predicts
from adaptkit.predict.tasks import TASKS, Asked, Described, Task
from adaptkit.predict.transform import Transform
from adaptkit.serve.limits import Refused
from adaptkit.serve.metrics import Metrics
from adaptkit.serve.passes import Passes

__all__ = ["Mounted", "Mounts", "checked_task"]


def checked_task(name: str) -> str:
    """Return a name that a URL can have as it is; ``ValueError`` for another."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise ValueError(f"a task cannot be served as {name!r}: use letters, digits, '-' and '_', at most 64")
    return name


class Shared(Predicts):
    """A task of the resident backbone, seen as a model that predicts."""

    def __init__(self, many: ManyTasks, name: str, passes: Passes) -> None:
        self.many, self.name, self.passes = many, name, passes
        self.why_alone = many.why_alone(name)

    @property
    def vit(self) -> Any:  # type: ignore[override]
        """The view of the resident backbone."""
        return self.many.model.vit

    def described(self) -> Described:
        """As the model of this adapter alone."""
        chosen = self.many.model.set_of(self.name)
        return describe(self.vit, chosen.metadata, chosen.head, self.features)

    def features(self, image: Tensor) -> Features:
        """Image (1, C, h, w) -> its features and what the head says, on the backbone's run that others read too."""
        return self.many.run_task(self.name, image, None if self.why_alone else self.passes.seen(image))


@dataclass(frozen=True)
class Mounted:
    """An adapter that is served."""

    name: str
    file: str  #: as it was given
    model: Predicts
    described: Described
    transform: Transform
    why_alone: str  #: why it needs runs of the backbone of its own; empty: it shares them

    def task(self, asked: Asked) -> Task:
        """Return what turns its images into answers."""
        return TASKS[self.described.answers](self.model, self.described, self.transform, asked)

    def answer(self, image: Tensor, asked: Asked) -> Answer:
        """Image (C, H, W) in 0..1 -> its answer."""
        [found] = self.task(asked).answer([image])
        return found

    def ahead(self, image: Tensor, asked: Asked) -> Tensor | None:
        """Image (C, H, W) in 0..1 -> what the backbone will be given for it (1, C, h, w); None where it runs alone."""
        if self.why_alone:
            return None
        [(seen, _)] = self.task(asked).looks(image)
        parameter = next(p for p in self.model.vit.backbone.parameters() if p.is_floating_point())
        return seen[None].to(parameter.device, parameter.dtype)

    def json(self) -> dict[str, Any]:
        """Say what it is."""
        size, crop = self.transform.size, self.transform.crop
        names = self.task(Asked()).names
        return {
            "name": self.name, "file": self.file, "answers": self.described.answers, "classes": names or None,
            "size": list(size) if isinstance(size, tuple) else size, "crop": crop,
            "pass": "shared" if not self.why_alone else "alone", "why": self.why_alone or None,
        }  # fmt: skip


class Mounts:
    """One backbone and what is mounted on it. Everything but ``read`` and ``all`` is for the thread that owns it.

    Args:
        backbone: is frozen and taken; move it to its device before.
        batching, most, metrics: see :class:`~adaptkit.serve.passes.Passes`.
        strict: make other backbone weights than a file's an error instead of a warning.
        positions: as :func:`adaptkit.attach` takes it, for all files.
    """

    def __init__(
        self, backbone: nn.Module, batching: str = "exact", most: int = 8, metrics: Metrics | None = None,
        strict: bool = False, positions: str | None = None,
    ) -> None:  # fmt: skip
        self.metrics, self.strict, self.positions = metrics or Metrics(), strict, positions
        self._plain = mark_shared(at_rest(skeleton(backbone)))  # for networks: the same weights, bare
        self._many = ManyTasks(attach(backbone, positions=positions)).eval()
        self.passes = Passes(self._many.model.vit, batching, most, self.metrics)
        self.all: Mapping[str, Mounted] = {}  #: replaced as a whole, so that other threads may read it

    @staticmethod
    def read(file: str) -> AdapterFile:
        """Read a file or download it: slow, and needs no model."""
        return load(file)

    @property
    def channels(self) -> int:
        """Of an image for the backbone."""
        return self._many.model.vit.spec.channels

    def of(self, name: str) -> Mounted:
        """Return what is mounted under a name; :class:`Refused` (404) names those that are."""
        if name not in self.all:
            there = ", ".join(self.all) or "none is mounted"
            raise Refused(404, f"no task is named {name[:64]!r}; the tasks are: {there}")
        return self.all[name]

    def mount(self, name: str, file: str, read: AdapterFile | None = None) -> Mounted:
        """Mount a file. Raises ``ValueError`` and ``TypeError`` where it does not fit or predicts nothing."""
        if checked_task(name) in self.all:
            raise ValueError(f"{name!r} is mounted already, from {self.all[name].file}: unmount it, or choose a name")
        read = read or self.read(file)
        around = network.recipe_of(read) is not None
        if around:
            model: Predicts = network.load(read, at_rest(skeleton(self._plain)), self.strict, self.positions)
            why = "a network around the adapter: it calls the backbone itself"
        else:
            self._many.add(name, read, strict=self.strict)
            self._many.eval()
            model = Shared(self._many, name, self.passes)
            why = model.why_alone
        try:
            made = Mounted(name, file, model, model.described(), model.transform, why)
            made.task(Asked())
        except BaseException:
            if not around:
                self._many.remove(name)
            raise
        self.all = {**self.all, name: made}
        self.metrics.mounted.set(len(self.all))
        return made

    def unmount(self, name: str) -> None:
        """Take one off; its memory is free at once."""
        gone = self.of(name)
        self.all = {n: m for n, m in self.all.items() if n != name}
        if isinstance(gone.model, Shared):
            self._many.remove(name)
        self.metrics.mounted.set(len(self.all))
