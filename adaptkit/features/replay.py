"""One pass of a frozen backbone, replayed for everybody who only reads it.

A frozen backbone gives the same tokens whoever asks. :func:`replay` runs it once and returns a view that answers from
what it saw: an extractor-only adapter, a pyramid or a head cannot tell the difference, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptkit.core.hierarchical import HierarchicalViT
from adaptkit.core.view import Features, Source, View, ViT
from adaptkit.features.cached import CachedFeatures

__all__ = ["CachedView", "Replay", "ReplayHierarchical", "replay"]


def replay(vit: View, image: Tensor, frozen: bool = True) -> View:
    """Run the backbone on (B, C, H, W) and return a view of that run, good for this image alone.

    ``frozen``: nothing in it is trained, so that no gradient is kept.
    """
    with torch.no_grad() if frozen else nullcontext():
        if isinstance(vit, HierarchicalViT):
            return ReplayHierarchical(vit, vit.features(image))
        if isinstance(vit, ViT):
            x, blocks = vit.begin(image)
            states = [x]
            for block in blocks:
                states.append(block(states[-1]))
            return Replay(vit, states, frozen)
    raise TypeError(f"{type(vit).__name__} is neither a ViT nor a HierarchicalViT; subclass one of them")


class _Replayed(View):
    """What both kinds hand on to the view that was run."""

    vit: Any
    replayed = True
    pad = "corner"  #: where the image that was run was padded to whole patches

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """As the view that was run."""
        return self.vit.fingerprint_tensors()

    def source(self) -> Source:
        """As the view that was run."""
        return self.vit.source()


class Replay(_Replayed, ViT):
    """A plain ViT's run: tokens (B, P+N, D) before the first block and after each, normed when somebody asks."""

    def __init__(self, vit: ViT, states: Sequence[Tensor], frozen: bool = True) -> None:
        ViT.__init__(self, vit.backbone, vit.spec)
        self.vit, self.states, self.frozen = vit, states, frozen
        self.normed: dict[int, Tensor] = {}  # by the index of the state: several tasks read the same ones
        self.positions, self.prefix_optional, self.splits = vit.positions, vit.prefix_optional, False

    def part(self, start: int, stop: int) -> Replay:
        """Return the run of some images of the batch."""
        return Replay(self.vit, [x[start:stop] for x in self.states], self.frozen)

    def begin(self, image: Tensor) -> tuple[Tensor, Sequence[Any]]:
        """Tokens before the first block, and for each block a function that returns its output."""
        return self.states[0], [partial(_output, self.states[i], self.states[i + 1]) for i in range(self.spec.depth)]

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """As it was."""
        return self.states[0]

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Any]:
        """As :meth:`begin`."""
        return self.begin(image)[1]

    def norm(self, x: Tensor) -> Tensor:
        """Apply the final norm; to each state of the run once."""
        index = next((i for i, state in enumerate(self.states) if state is x), None)
        if index is None:
            return self.vit.norm(x)
        if index not in self.normed:
            with torch.no_grad() if self.frozen else nullcontext():
                self.normed[index] = self.vit.norm(x)
        return self.normed[index]

    def classify(self, x: Tensor) -> Tensor | None:
        """The backbone's classifier."""
        return self.vit.classify(x)


class CachedView(Replay):
    """A plain ViT's run of which some states are known: those that the adapters read."""

    def __init__(self, vit: ViT, seen: CachedFeatures) -> None:
        dtype = next(vit.backbone.parameters()).dtype
        known = {index: state.to(dtype) for index, state in zip(seen.after, seen.states)}
        last = known.get(vit.spec.depth - 1)
        if last is None:
            raise ValueError(f"features after the blocks {list(seen.after)}, and not after the last one")
        super().__init__(vit, [last])
        self.known, self.pad = known, seen.pad

    def begin(self, image: Tensor) -> tuple[Tensor, Sequence[Any]]:
        """Tokens that stand for those before the first block, and for each block what it gave, where that is known."""
        return self.states[-1], [partial(_known_output, self.known.get(i)) for i in range(self.spec.depth)]


class ReplayHierarchical(_Replayed, HierarchicalViT):
    """A hierarchical backbone's run: the features of its plain forward."""

    def __init__(self, vit: HierarchicalViT, seen: Features) -> None:
        HierarchicalViT.__init__(self, vit.backbone, vit.spec)
        self.vit, self.seen, self.positions = vit, seen, vit.positions

    def part(self, start: int, stop: int) -> ReplayHierarchical:
        """Return the run of some images of the batch."""
        f = self.seen
        maps = tuple(m[start:stop] for m in f.maps)
        part = f._replace(tokens=f.tokens[start:stop], prefix=f.prefix[start:stop], maps=maps)
        return ReplayHierarchical(self.vit, part)

    def features(self, image: Tensor) -> Features:
        """As they were."""
        return self.seen

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Run anew."""
        return self.vit.embed(image)

    def enter(self, stage: int, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Run anew."""
        return self.vit.enter(stage, x, grid)

    def blocks(self, stage: int, grid: tuple[int, int]) -> Sequence[Any]:
        """Run anew."""
        return self.vit.blocks(stage, grid)

    def norm(self, x: Tensor) -> Tensor:
        """Run anew."""
        return self.vit.norm(x)

    def classify(self, x: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """The backbone's classifier."""
        return self.vit.classify(x, grid)


def _output(before: Tensor, after: Tensor, x: Tensor) -> Tensor:
    if x is not before:
        raise RuntimeError(
            "an adapter that changes the tokens was given the features of another run: it needs a pass of its own"
        )
    return after


def _known_output(after: Tensor | None, x: Tensor) -> Tensor:
    return x if after is None else after
