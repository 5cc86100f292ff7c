"""Runs of the resident backbone: each is made once for all who read it, and several images may share one.

Whether a batch of images has the bits that they have alone depends on how a library cuts its matrix products, and so on
the shape of the batch, the number of threads and the machine. Nobody promises it, so it is tried: the first batch of a
shape also runs image by image, and what was said image by image is what is answered. From then on batches of this shape
are formed if all bits were equal, and never if one was not.

Only the backbone's pass is shared. Adapters and heads run image by image, as they do in ``predict``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptkit.core.view import View
from adaptkit.features.replay import Replay, ReplayHierarchical, replay
from adaptkit.serve.metrics import Metrics

__all__ = ["BATCHING", "Passes"]

#: Which images share a pass: those whose bits it keeps; those of one size; none.
BATCHING = ("exact", "close", "off")
SHAPES = 4096  #: that are remembered


class Passes:
    """Runs of one backbone, kept while a batch of requests is answered.

    Args:
        vit: the view of the backbone.
        batching: one of ``BATCHING``.
        most: images of one pass.
        metrics: counts passes.
    """

    def __init__(self, vit: View, batching: str, most: int, metrics: Metrics) -> None:
        if batching not in BATCHING:
            raise ValueError(f"batching={batching!r}: choose one of {', '.join(BATCHING)}")
        self.vit, self.batching, self.most, self.metrics = vit, batching, most, metrics
        self.keeps_bits: OrderedDict[tuple[int, ...], bool] = OrderedDict()  # by the shape of the batch
        self._made: list[tuple[Tensor, View]] = []

    def seen(self, image: Tensor) -> View:
        """Image (1, C, h, w) -> the backbone's run on it: one that is there, or a new one."""
        for given, view in self._made:
            if given.shape == image.shape and torch.equal(given, image):
                return view
        self._keep(image, self._alone(image))
        return self._made[-1][1]

    def ahead(self, images: Sequence[Tensor]) -> None:
        """Run images (1, C, h, w) that will be asked for, together where that may be."""
        distinct: dict[tuple[int, ...], list[Tensor]] = {}
        for image in images:
            group = distinct.setdefault(tuple(image.shape), [])
            if not any(torch.equal(image, other) for other in group):
                group.append(image)
        for group in distinct.values():
            start = 0
            for size in _powers(len(group), self.most if self.batching != "off" else 1):
                self._run(group[start : start + size])
                start += size

    def forget(self) -> None:
        """Drop every run."""
        self._made = []

    def _run(self, group: list[Tensor]) -> None:
        batch = torch.cat(group)
        known = True if self.batching == "close" else self.keeps_bits.get(tuple(batch.shape))
        if len(group) == 1 or known is False:
            for image in group:
                self._keep(image, self._alone(image))
            return
        together = replay(self.vit, batch)
        self.metrics.ran("shared", len(group))
        views = [_own_memory(together.part(i, i + 1)) for i in range(len(group))]  # type: ignore[attr-defined]
        if known is None:
            alone = [self._alone(image) for image in group]
            same = all(torch.equal(a, b) for v, w in zip(views, alone) for a, b in zip(_tensors(v), _tensors(w)))
            self.keeps_bits[tuple(batch.shape)] = same
            if len(self.keeps_bits) > SHAPES:
                self.keeps_bits.popitem(last=False)
            views = alone
        for image, view in zip(group, views):
            self._keep(image, view)

    def _alone(self, image: Tensor) -> View:
        self.metrics.ran("shared", 1)
        return replay(self.vit, image)

    def _keep(self, image: Tensor, view: View) -> None:
        self._made.append((image, view))


def _powers(count: int, most: int) -> list[int]:
    """Cut a number into powers of two up to ``most``, so that few shapes of batches occur: 7 -> 4, 2, 1."""
    sizes: list[int] = []
    while count:
        sizes.append(1 << (min(count, most).bit_length() - 1))
        count -= sizes[-1]
    return sizes


def _tensors(view: Any) -> list[Tensor]:
    """Return all that a run holds."""
    if isinstance(view, Replay):
        return list(view.states)
    return [view.seen.tokens, view.seen.prefix, *view.seen.maps]


def _own_memory(view: Any) -> View:
    """Lay a part of a batch's run as it lies where the image ran alone: at the start of memory of its own."""
    if isinstance(view, Replay):
        view.states = [x.clone() for x in view.states]
    elif isinstance(view, ReplayHierarchical):
        f = view.seen
        maps = tuple(m.clone() for m in f.maps)
        view.seen = f._replace(tokens=f.tokens.clone(), prefix=f.prefix.clone(), maps=maps)
    return view
