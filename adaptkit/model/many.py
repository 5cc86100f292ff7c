"""Many tasks on one backbone: it runs once, and every adapter and head that only reads it runs beside.

    many = adaptkit.attach_many(backbone, {"seg": "runs/seg", "depth": "runs/depth"})
    out = many(image)
    out["seg"].logits, out["depth"].logits

A set of adapters that changes what the blocks compute (injectors, LoRA, block adapters) cannot share the pass: it has
one of its own, and :func:`attach_many` says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.adapters.base import BlockAdapter
from adaptkit.core.proxy import LayerProxy, Route, Routed, WeightProxy, put, routing
from adaptkit.core.view import Features, View
from adaptkit.core.warned import warn
from adaptkit.features.replay import replay
from adaptkit.model.adapted import AdaptedModel, attach
from adaptkit.model.forward import run
from adaptkit.model.image import check_image
from adaptkit.model.parts import AdapterSet

__all__ = ["ManyTasks", "attach_many"]


def attach_many(
    model: nn.Module,
    tasks: Mapping[str, Any],
    heads: Mapping[str, Any] | None = None,
    strict: bool = False,
    positions: str | None = None,
) -> ManyTasks:
    """Freeze ``model`` and attach a set of adapters and a head for each task.

    Args:
        model: as :func:`adaptkit.attach` takes it.
        tasks: by name a saved adapter (folder, Hub id, ``adaptkit.load(...)``), or whatever ``attach`` takes as an
            adapter, or a list of these.
        heads: by name, as ``attach(head=...)``; a saved adapter brings its own.
        strict: as ``attach``.
        positions: as ``attach``; one rule for all tasks, as they share the tokens. A file of another one is a warning.

    Raises ``ValueError`` and ``TypeError`` as ``attach``, for the task that is named, and ``ValueError`` for one that
    trains parts of the backbone: there is one backbone for all.
    """
    if not tasks:
        raise ValueError("no tasks are given: pass {name: adapter, ...}")
    unknown = sorted((heads or {}).keys() - tasks.keys())
    if unknown:
        raise ValueError(f"heads are given for {', '.join(unknown)}, the tasks are {', '.join(tasks)}")
    many = ManyTasks(attach(model, positions=positions))
    try:
        for name, adapters in tasks.items():
            many.add(name, adapters, (heads or {}).get(name), strict)
    except BaseException:
        many.detach()
        raise
    return many.train(any(one.training for one in many.model.sets.values()))


class ManyTasks(nn.Module):
    """A frozen backbone with several sets of adapters that all run; ``model(image)`` returns ``{name: Features}``.

    A forward changes nothing, so that several threads may call the model at once, each for its own tasks.
    """

    def __init__(self, model: AdaptedModel) -> None:
        super().__init__()
        model.delete_adapter("default")
        model._together = True
        self.model = model
        self.active: tuple[str, ...] = ()
        self.__dict__["_routed"] = {}  # path of a layer -> the proxy that runs the adapter of the task at hand

    @property
    def tasks(self) -> list[str]:
        """Every task, active or not."""
        return list(self.model.sets)

    def add(self, name: str, adapters: Any, head: Any = None, strict: bool = False) -> None:
        """Attach a task; it is active at once."""
        given = adapters if isinstance(adapters, list) else [adapters]
        try:
            self.model.add_adapter(*given, name=name, head=head, strict=strict)
            self._route(name)
        except (ValueError, TypeError) as error:
            if name in self.model.sets and name not in self.active:
                self.model.delete_adapter(name)
            raise type(error)(f"task {name!r}: {error}") from error
        self.active = (*self.active, name)
        why = self._set(name).why_alone()
        if why:
            warn(f"task {name!r} has a pass of its own: {why}")

    def _route(self, name: str) -> None:
        """Have the layers that this task's LoRA changes run it whenever the task is at hand."""
        chosen, routed = self._set(name), self.__dict__["_routed"]
        if chosen.backbone is not None:
            raise ValueError("it trains parts of the backbone, which all tasks share: attach() it alone")
        new: dict[str, LayerProxy] = {}
        for adapter in chosen.weight_adapters:
            for path, proxy in adapter.proxies.items():
                if path not in routed and path not in new:
                    kind = WeightProxy if isinstance(proxy, WeightProxy) else LayerProxy
                    new[path] = kind(Routed(proxy.layer), proxy.layer)
        put(self.model.vit.backbone, new)
        routed.update(new)
        for adapter in chosen.weight_adapters:
            for path, proxy in adapter.proxies.items():
                proxy.bind(routed[path].layer)
                vars(routed[path])["wrapper"].wrappers[name] = vars(proxy)["wrapper"]

    def remove(self, name: str) -> None:
        """Drop a task."""
        self._set(name)
        self.active = tuple(n for n in self.active if n != name)
        for proxy in self.__dict__["_routed"].values():
            vars(proxy)["wrapper"].wrappers.pop(name, None)
        self.model.delete_adapter(name)

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
        """Image (B, C, H, W) -> features by task; with ``tasks``, a name for each image, of the images of that task.

        Images of a task are in the order in which they were given. With ``tasks`` those that only read the backbone
        and those that change its layers (LoRA) share one pass, each row with its own adapter.
        """
        check_image(self.model.vit, image)
        if tasks is None:
            return self._run(image, dict.fromkeys(self.active))
        if len(tasks) != len(image):
            raise ValueError(f"{len(image)} images and {len(tasks)} tasks: give the name of a task for each image")
        rows = {n: [i for i, t in enumerate(tasks) if t == n] for n in dict.fromkeys(tasks)}
        return self._run(image, {n: torch.tensor(r, device=image.device) for n, r in rows.items()})

    def run_task(self, name: str, image: Tensor, seen: View | None = None) -> Features:
        """Run one task, active or not, on (B, C, H, W).

        ``seen``: the backbone's run on this very image (:func:`~adaptkit.features.replay.replay`), for a task that
        only reads the backbone; without it the backbone runs.
        """
        if seen is not None:
            return run(seen, self._set(name), image)
        with routing(Route(name, 0, len(image), len(image))):
            return run(self.model.vit, self._set(name), image)

    def why_alone(self, name: str) -> str:
        """Say why a task needs a pass of the backbone of its own; empty where it reads one that others read too."""
        return self._set(name).why_alone()

    def _run(self, image: Tensor, rows: Mapping[str, Tensor | None]) -> dict[str, Features]:
        """Run the tasks on their rows of the batch, on all of it where there are none."""
        out: dict[str, Features] = {}
        by_row = all(index is not None for index in rows.values())
        shared = [name for name in rows if not self._set(name).why_alone() or (by_row and self._mixes(name))]
        for name in (n for n in rows if n not in shared):
            out[name] = self.run_task(name, image if rows[name] is None else image[rows[name]])
        if shared:
            out.update(self._run_shared(image, {name: rows[name] for name in shared}))
        return {name: out[name] for name in rows}

    def _run_shared(self, image: Tensor, rows: Mapping[str, Tensor | None]) -> dict[str, Features]:
        """One pass for all of these: on the batch itself, or on the rows of each, one task after the other."""
        vit, given = self.model.vit, {n: index for n, index in rows.items() if index is not None}
        if not given:
            seen: Any = replay(vit, image)
            return {name: run(seen, self._set(name), image) for name in rows}
        image = image[torch.cat(list(given.values()))]
        routes: list[Route] = []
        for name, index in given.items():
            start = routes[-1].stop if routes else 0
            routes.append(Route(name, start, start + len(index), len(image)))
        lora = any(self._set(name).weight_adapters for name in given)
        with routing(*routes):
            seen = replay(vit, image, frozen=not lora)
        return {r.task: run(seen.part(r.start, r.stop), self._set(r.task), image[r.start : r.stop]) for r in routes}

    def _mixes(self, name: str) -> bool:
        """Whether the set changes layers alone, so that rows of other tasks can run through them beside its own."""
        one = self._set(name)
        reads = one.side is None or not one.side.why_alone()
        blocks = any(isinstance(adapter, BlockAdapter) for adapter in one)
        return reads and not blocks and all(a.mixes for a in one.weight_adapters)

    def save(self, name: str, folder: str | os.PathLike[str], **metadata: Any) -> Path:
        """Write one task's adapters and head, as ``AdaptedModel.save`` does."""
        return self.model.save(folder, name=name, **metadata)

    def detach(self) -> nn.Module:
        """Return the backbone as it was given."""
        return self.model.detach()

    def _set(self, name: str) -> AdapterSet:
        return self.model.set_of(name)
