"""The view of a backbone whose blocks are wrapped by adapters, for one forward: the same tokens and the same norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from adaptkit.adapters.base import Adapter, BlockAdapter, SideAdapter
from adaptkit.core.block import Block, Fn
from adaptkit.core.checkpointing import OFF, Aux, Checkpointed, Checkpointing
from adaptkit.core.hierarchical import HierarchicalViT
from adaptkit.core.view import Source, View, ViT
from adaptkit.seam import modes, records_gradients

__all__ = ["WrappedHierarchicalViT", "WrappedViT", "wrapped"]

#: A method of each sharded block: runs a function of its parts while its parameters are whole.
RUN_WHOLE = "run_whole"


def wrapped(vit: View, acting: Iterable[Adapter], aux: Aux) -> View:
    """Return the view for one forward: its blocks wrapped by these adapters, and checkpointed where that is on.

    Args:
        vit: the backbone's own view.
        acting: adapters; side adapters among them wrap nothing.
        aux: what the adapters report in this forward; returned as ``Features.aux``.
    """
    adapters = [adapter for adapter in acting if not isinstance(adapter, SideAdapter)]
    wrappers = [adapter for adapter in adapters if isinstance(adapter, BlockAdapter)]
    how = vit.how_checkpointing() if records_gradients() else OFF
    if not wrappers and not how.every:
        return vit
    trained = how.every > 0 and any(p.requires_grad for m in (vit.backbone, *adapters) for p in m.parameters())
    if isinstance(vit, HierarchicalViT):
        return WrappedHierarchicalViT(vit, wrappers, aux, how, trained)
    if isinstance(vit, ViT):
        return WrappedViT(vit, wrappers, aux, how, trained)
    raise TypeError(f"{type(vit).__name__} is neither a ViT nor a HierarchicalViT; subclass one of them")


def _wrap(block: Block, index: int, adapters: Sequence[BlockAdapter], aux: Aux) -> Fn:
    run: Fn = block
    for adapter in adapters:
        run = adapter.wrap(run if isinstance(run, Block) else replace(block, run=run), index, aux)
    return run


def _wrap_all(view: Any, blocks: Sequence[Block], first: int, grid: tuple[int, int]) -> list[Fn]:
    """Wrap these blocks, the first of which has index ``first``; checkpoint those that are."""
    on_grid = [replace(b, grid=grid, repeatable=not view.vit.sharded) for b in blocks]
    builds = [partial(_build, view, b, i) for i, b in enumerate(on_grid, first)]
    how: Checkpointing = view.how
    state = view.state() if how.every else ()
    return [
        Checkpointed(build, view.aux, view.trained, how.options, state) if how.of(i) else build(view.aux)
        for i, build in enumerate(builds, first)
    ]


def _state(adapters: Sequence[BlockAdapter]) -> list[tuple[object, str]]:
    """What a forward of the adapters reads besides tensors: their modes and their switches."""
    switches: list[tuple[object, str]] = [(adapter, name) for adapter in adapters for name in adapter.switches]
    return [*modes(m for adapter in adapters for m in adapter.modules()), *switches]


def _build(view: Any, block: Block, index: int, aux: Aux) -> Fn:
    """Return a wrapped block that reports to these aux outputs."""
    run, sharded = _wrap(block, index, view.adapters, aux), view.vit.sharded
    if not sharded or not any(adapter.inside for adapter in view.adapters):
        return run
    return partial(getattr(sharded[index], RUN_WHOLE), run)


class _Wrapped(View):
    """What both kinds of wrapped view have in common; all else is the inner view's."""

    def __init__(
        self,
        vit: Any,
        adapters: Sequence[BlockAdapter],
        aux: Aux,
        how: Checkpointing = OFF,
        trained: bool = True,
    ) -> None:
        """``trained``: whether a checkpointed block has something to train."""
        super().__init__(vit.backbone, vit.spec)  # type: ignore[call-arg]  # of the kind of view beside this one
        self.vit, self.adapters, self.aux, self.how, self.trained = vit, adapters, aux, how, trained
        self.positions = vit.positions

    def norm(self, x: Tensor) -> Tensor:
        """As the inner view."""
        normed: Tensor = self.vit.norm(x)
        return normed

    def state(self) -> list[tuple[object, str]]:
        """Of the inner view, and of the adapters."""
        return [*self.vit.state(), *_state(self.adapters)]

    def how_checkpointing(self) -> Checkpointing:
        """As the blocks are checkpointed."""
        return self.how

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """As the inner view."""
        tensors: dict[str, Tensor] = self.vit.fingerprint_tensors()
        return tensors

    def source(self) -> Source:
        """As the inner view."""
        source: Source = self.vit.source()
        return source


class WrappedViT(_Wrapped, ViT):
    """A view whose blocks are wrapped by block adapters, for one forward."""

    def __init__(self, vit: ViT, *args: Any) -> None:
        super().__init__(vit, *args)
        self.prefix_optional, self.splits = vit.prefix_optional, vit.splits

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """As the inner view."""
        return self.vit.embed(image, grid)

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Any]:
        """Blocks of the inner view, each wrapped in the order given."""
        return _wrap_all(self, self.vit.blocks(image, grid), 0, grid)

    def classify(self, x: Tensor) -> Tensor | None:
        """As the inner view."""
        return self.vit.classify(x)


class WrappedHierarchicalViT(_Wrapped, HierarchicalViT):
    """A hierarchical view whose blocks are wrapped by block adapters, for one forward."""

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """As the inner view."""
        return self.vit.embed(image)

    def enter(self, stage: int, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """As the inner view."""
        return self.vit.enter(stage, x, grid)

    def blocks(self, stage: int, grid: tuple[int, int]) -> Sequence[Any]:
        """Blocks of the inner view, each wrapped in the order given."""
        return _wrap_all(self, self.vit.blocks(stage, grid), sum(self.spec.depths[:stage]), grid)

    def classify(self, x: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """As the inner view."""
        return self.vit.classify(x, grid)
