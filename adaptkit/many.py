"""Many tasks on one backbone: it runs once, and every adapter and head that only reads it runs beside.

    many = adaptkit.attach_many(backbone, {"seg": "runs/seg", "depth": "runs/depth"})
    out = many(image)
    out["seg"].logits, out["depth"].logits

A set of adapters that changes what the blocks compute (injectors, LoRA, block adapters) cannot share the pass: it has
one of its own, and :func:`attach_many` says so.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.model import AdaptedModel, attach, run
from adaptkit.parts import AdapterSet
from adaptkit.replay import replay
from adaptkit.vit import Features

__all__ = ["ManyTasks", "attach_many"]


def attach_many(
    model: nn.Module, tasks: Mapping[str, Any], heads: Mapping[str, Any] | None = None, strict: bool = False
) -> ManyTasks:
    """Freeze ``model`` and attach a set of adapters and a head for each task.

    Args:
        model: as :func:`adaptkit.attach` takes it.
        tasks: by name a saved adapter (folder, Hub id, ``adaptkit.load(...)``), or whatever ``attach`` takes as an
            adapter, or a list of these.
        heads: by name, as ``attach(head=...)``; a saved adapter brings its own.
        strict: as ``attach``.

    Raises ``ValueError`` and ``TypeError`` as ``attach``, for the task that is named.
    """
    if not tasks:
        raise ValueError("no tasks are given: pass {name: adapter, ...}")
    many = ManyTasks(attach(model))
    try:
        for name, adapters in tasks.items():
            many.add(name, adapters, (heads or {}).get(name), strict)
        unknown = sorted((heads or {}).keys() - tasks.keys())
        if unknown:
            raise ValueError(f"heads are given for {', '.join(unknown)}, the tasks are {', '.join(tasks)}")
    except BaseException:
        many.detach()
        raise
    return many


class ManyTasks(nn.Module):
    """A frozen backbone with several sets of adapters that all run; ``model(image)`` returns ``{name: Features}``."""

    def __init__(self, model: AdaptedModel) -> None:
        super().__init__()
        model.delete_adapter("default")
        self.model = model
        self.active: tuple[str, ...] = ()

    @property
    def tasks(self) -> list[str]:
        """Every task, active or not."""
        return list(self.model.sets)

    def add(self, name: str, adapters: Any, head: Any = None, strict: bool = False) -> None:
        """Attach a task; it is active at once."""
        given = adapters if isinstance(adapters, list) else [adapters]
        try:
            self.model.add_adapter(*given, name=name, head=head, strict=strict)
        except (ValueError, TypeError) as error:
            raise type(error)(f"task {name!r}: {error}") from error
        self._set(name).trained_again()
        self.active = (*self.active, name)
        why = self._set(name).why_alone()
        if why:
            warnings.warn(f"task {name!r} has a pass of its own: {why}", UserWarning, stacklevel=3)

    def remove(self, name: str) -> None:
        """Drop a task."""
        self._set(name)
        self.model.delete_adapter(name)
        self.active = tuple(n for n in self.active if n != name)

    def set_active(self, *names: str) -> None:
        """Run these tasks and no others, in this order."""
        for name in names:
            self._set(name)
        self.active = names

    def passes(self) -> int:
        """Return how often the backbone runs for one image."""
        alone = [name for name in self.active if self._set(name).why_alone()]
        return len(alone) + (1 if len(alone) < len(self.active) else 0)

    def forward(self, image: Tensor, tasks: Sequence[str] | None = None) -> dict[str, Features]:
        """Image (B, 3, H, W) -> features by task; with ``tasks``, a name for each image, of the images of that task.

        Images of a task are in the order in which they were given.
        """
        if tasks is None:
            return self._run(image, dict.fromkeys(self.active))
        if len(tasks) != len(image):
            raise ValueError(f"{len(image)} images and {len(tasks)} tasks: give the name of a task for each image")
        rows = {n: [i for i, t in enumerate(tasks) if t == n] for n in dict.fromkeys(tasks)}
        return self._run(image, {n: torch.tensor(r, device=image.device) for n, r in rows.items()})

    def _run(self, image: Tensor, rows: Mapping[str, Tensor | None]) -> dict[str, Features]:
        """Run the tasks on their rows of the batch, on all of it where there are none."""
        vit, out = self.model.vit, {}
        shared = [name for name in rows if not self._set(name).why_alone()]
        seen = replay(vit, _rows(image, [rows[n] for n in shared])) if shared else None
        start = 0
        for name, index in rows.items():
            chosen, own = self._set(name), image if index is None else image[index]
            if seen is not None and name in shared:
                told = seen if index is None else seen.part(start, start + len(own))  # type: ignore[attr-defined]
                start += len(own)
                out[name] = run(told, chosen, own)
                continue
            for adapter in chosen.weight_adapters:
                adapter.install()
            try:
                out[name] = run(vit, chosen, own)
            finally:
                for adapter in chosen.weight_adapters:
                    adapter.remove()
        return out

    def save(self, name: str, folder: str | os.PathLike[str], **metadata: Any) -> Path:
        """Write one task's adapters and head, as ``AdaptedModel.save`` does."""
        return self.model.save(folder, name=name, **metadata)

    def detach(self) -> nn.Module:
        """Return the backbone as it was given."""
        return self.model.detach()

    def _set(self, name: str) -> AdapterSet:
        return self.model.set_of(name)


def _rows(image: Tensor, chosen: Sequence[Tensor | None]) -> Tensor:
    """Rows of the tasks that share a pass, one task after the other; the batch itself where each has all of it."""
    given = [index for index in chosen if index is not None]
    return image[torch.cat(given)] if given else image
