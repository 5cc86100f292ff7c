"""The kinds of adapter, and how they stack.

A *block adapter* wraps one frozen block; any number of them, in the order given. A *side adapter* runs a stream
beside the blocks and owns the loop over them; at most one. Both can be attached at once: the side adapter then sees
wrapped blocks. A forward writes nothing to ``self``: what an adapter reports goes into the ``trace``, a dict of tensors
made for this forward and returned as ``Features.aux``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from adaptkit.core.block import Block, Fn
from adaptkit.core.checkpointing import OFF, Checkpointed, Checkpointing, Trace
from adaptkit.core.hierarchical import HierarchicalViT
from adaptkit.core.proxy import LayerProxy
from adaptkit.core.view import Features, Source, View, ViT
from adaptkit.seam import modes, records_gradients

__all__ = [
    "Adapter",
    "BlockAdapter",
    "SideAdapter",
    "Trace",
    "WeightAdapter",
    "WrappedHierarchicalViT",
    "WrappedViT",
    "wrapped",
]

#: A method of each sharded block: runs a function of its parts while its parameters are whole.
RUN_WHOLE = "run_whole"


class Adapter(nn.Module, ABC):
    """A trainable module built from ``spec`` and ``config``, so that its file fits every backbone of that spec.

    One that ``takes_backbone`` is built as ``cls(spec, config, backbone)``, from the backbone's own layers.

    A subclass completes the config (a preset per width, say) and keeps it as ``self.config``: the file stores that.
    """

    strides: tuple[int, ...] = ()  #: of the maps it returns, in pixels
    #: whether it also acts on hierarchical backbones; its spec may then be a HierarchicalSpec
    hierarchical: ClassVar[bool] = False
    takes_backbone: ClassVar[bool] = False
    #: Learning rates of submodules by name, as multiples of the base rate: the authors' choice, which the recipes take.
    learning_rates: ClassVar[Mapping[str, float]] = MappingProxyType({})

    def __init__(self, spec: Any, config: Any) -> None:
        super().__init__()
        self.spec = spec
        self.config = config

    @classmethod
    def existing(cls, backbone: nn.Module) -> ExistingLayers | None:
        """Return another library's adapter layers in this backbone, which this adapter replaces; None where none is."""
        return None

    def translated(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of a file as this backbone names its layers."""
        return tensors

    def ways(self, model: nn.Module, view: View, image: Tensor) -> dict[str, tuple[Features, Features]]:
        """Run an image (B, C, H, W) in every way this adapter can execute, for :meth:`AdaptedModel.verify`.

        Returns pairs of features that must be equal, keyed by the error message for when they differ; ``{}`` where
        there is one way only. The model is in eval mode.
        """
        return {}


class ExistingLayers(ABC):
    """Layers that a backbone came with, which an adapter takes the place of for as long as it is attached."""

    adapter: str  #: its registered name
    config: Any  #: from which it is built

    @abstractmethod
    def share(self, adapter: nn.Module) -> None:
        """Give these very parameters to the adapter that takes their place, so that what is trained is the same.

        Raises ``ValueError`` where it has others; nothing is shared then.
        """

    @abstractmethod
    def take_out(self, backbone: nn.Module) -> None:
        """Put the backbone's own layers into the places of these."""

    @abstractmethod
    def restore(self, backbone: nn.Module) -> None:
        """Put these where they were, with the parameters that the adapter has now."""


class BlockAdapter(Adapter):
    """Acts around one block at a time.

    One that steps ``inside`` runs the block from its parts, so it must wrap the bare block: it comes before every
    other block adapter, and needs a backbone whose attention comes apart (``ViT.splits``).
    """

    inside: ClassVar[bool] = False
    #: names of the adapter's non-tensor attributes that a block's forward reads; recomputation restores their values
    switches: ClassVar[tuple[str, ...]] = ()

    def check_blocks(self, view: View) -> None:
        """Raise ``TypeError`` where it cannot act in the blocks of this backbone, beside what ``inside`` says."""

    @abstractmethod
    def wrap(self, block: Block, index: int, trace: Trace) -> Fn:
        """Return what runs in place of block ``index``: (B, P+N, D) -> (B, P+N, D).

        Called once more, with a trace of its own, where a checkpointed block runs again in the backward pass.
        """

    def must_repeat(self, trace: Trace) -> bool:
        """Return whether the forward that filled this trace must run again, with a fresh one.

        Called once after each forward. Entries that only the adapter needs are removed from the trace here. May return
        True only where every block is ``repeatable``.
        """
        return False


class SideAdapter(Adapter):
    """Owns the loop over the blocks, and may make a pyramid."""

    def reads(self) -> tuple[int, ...]:
        """Return the blocks whose outputs it reads; the last one is read in any case."""
        return tuple(range(self.spec.depth))

    def reads_image(self) -> bool:
        """Whether it reads the image too."""
        return True

    @property
    def pad(self) -> str:
        """Where the zeros are that make an image whole patches: ``"corner"``, right and below, or ``"centre"``."""
        return "corner"

    def framed(self, image: Tensor) -> Tensor:
        """Image (B, C, H, W) -> as the backbone is given it."""
        return image

    def why_alone(self) -> str:
        """Say why it changes what the blocks get, so that no other can share their pass; empty where it only reads."""
        return f"{type(self).__name__} changes what the blocks get"

    @abstractmethod
    def forward(self, vit: ViT, image: Tensor, trace: Trace) -> Features:
        """Image (B, C, H, W) -> features, as ``vit.finish`` closes them."""


class WeightAdapter(Adapter):
    """Acts inside layers of the backbone. Built for one, and in place between ``install`` and ``remove``."""

    hierarchical = True
    takes_backbone = True
    merges: ClassVar[bool] = True  #: whether its change can become part of the weights

    def __init__(self, spec: Any, config: Any) -> None:
        """A subclass also takes the backbone."""
        super().__init__(spec, config)

    @abstractmethod
    def install(self, backbone: nn.Module) -> None:
        """Put the change into the backbone's layers: into all of them or, with an error, into none."""

    @abstractmethod
    def remove(self, backbone: nn.Module) -> None:
        """Take it out: the backbone is as it was, bit for bit."""

    @abstractmethod
    def merge(self) -> None:
        """Add the change to the weights, so that it costs nothing; to all of them or, with an error, to none."""

    @abstractmethod
    def unmerge(self) -> None:
        """Put the weights back, exactly."""

    @property
    @abstractmethod
    def merged(self) -> bool:
        """Whether the backbone's weights hold the change."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the tensors of the backbone that it changes, by plain name, as they are now."""

    def originals(self) -> dict[str, Tensor]:
        """Return the tensors of the backbone, by plain name, that it keeps while others are in their places."""
        return {}

    @property
    def proxies(self) -> Mapping[str, LayerProxy]:
        """What takes the place of layers in which it acts beside the backbone's own, by the path of the layer."""
        return {}

    @property
    def mixes(self) -> bool:
        """Whether each row of a batch may have another task's."""
        return False

    def check(self, backbone: nn.Module) -> None:
        """Raise ``RuntimeError`` where, installed, it is no longer in place: somebody has replaced a layer."""


def wrapped(vit: View, acting: Iterable[Adapter], trace: Trace) -> View:
    """Return the view for one forward: its blocks wrapped by these adapters, and checkpointed where that is on.

    Args:
        vit: the backbone's own view.
        acting: adapters; side adapters among them wrap nothing.
        trace: what the adapters report in this forward; returned as ``Features.aux``.
    """
    adapters = [adapter for adapter in acting if not isinstance(adapter, SideAdapter)]
    wrappers = [adapter for adapter in adapters if isinstance(adapter, BlockAdapter)]
    how = vit.how_checkpointing() if records_gradients() else OFF
    if not wrappers and not how.every:
        return vit
    trained = how.every > 0 and any(p.requires_grad for m in (vit.backbone, *adapters) for p in m.parameters())
    if isinstance(vit, HierarchicalViT):
        return WrappedHierarchicalViT(vit, wrappers, trace, how, trained)
    if isinstance(vit, ViT):
        return WrappedViT(vit, wrappers, trace, how, trained)
    raise TypeError(f"{type(vit).__name__} is neither a ViT nor a HierarchicalViT; subclass one of them")


def _wrap(block: Block, index: int, adapters: Sequence[BlockAdapter], trace: Trace) -> Fn:
    run: Fn = block
    for adapter in adapters:
        run = adapter.wrap(run if isinstance(run, Block) else replace(block, run=run), index, trace)
    return run


def _wrap_all(view: Any, blocks: Sequence[Block], first: int, grid: tuple[int, int]) -> list[Fn]:
    """Wrap these blocks, the first of which has index ``first``; checkpoint those that are."""
    on_grid = [replace(b, grid=grid, repeatable=not view.vit.sharded) for b in blocks]
    builds = [partial(_build, view, b, i) for i, b in enumerate(on_grid, first)]
    how: Checkpointing = view.how
    state = view.state() if how.every else ()
    return [
        Checkpointed(build, view.trace, view.trained, how.options, state) if how.of(i) else build(view.trace)
        for i, build in enumerate(builds, first)
    ]


def _state(adapters: Sequence[BlockAdapter]) -> list[tuple[object, str]]:
    """What a forward of the adapters reads besides tensors: their modes and their switches."""
    switches: list[tuple[object, str]] = [(adapter, name) for adapter in adapters for name in adapter.switches]
    return [*modes(m for adapter in adapters for m in adapter.modules()), *switches]


def _build(view: Any, block: Block, index: int, trace: Trace) -> Fn:
    """Return a wrapped block that reports to this trace."""
    run, sharded = _wrap(block, index, view.adapters, trace), view.vit.sharded
    if not sharded or not any(adapter.inside for adapter in view.adapters):
        return run
    return partial(getattr(sharded[index], RUN_WHOLE), run)


class WrappedViT(ViT):
    """A view whose blocks are wrapped by block adapters, for one forward."""

    def __init__(
        self,
        vit: ViT,
        adapters: Sequence[BlockAdapter],
        trace: Trace,
        how: Checkpointing = OFF,
        trained: bool = True,
    ) -> None:
        """``trained``: whether a checkpointed block has something to train."""
        super().__init__(vit.backbone, vit.spec)
        self.vit, self.adapters, self.trace, self.how, self.trained = vit, adapters, trace, how, trained
        self.positions, self.prefix_optional, self.splits = vit.positions, vit.prefix_optional, vit.splits

    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """As the inner view."""
        return self.vit.embed(image, grid)

    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Any]:
        """Blocks of the inner view, each wrapped in the order given."""
        return _wrap_all(self, self.vit.blocks(image, grid), 0, grid)

    def norm(self, x: Tensor) -> Tensor:
        """As the inner view."""
        return self.vit.norm(x)

    def state(self) -> list[tuple[object, str]]:
        """Of the inner view, and of the adapters."""
        return [*self.vit.state(), *_state(self.adapters)]

    def how_checkpointing(self) -> Checkpointing:
        """As the blocks are checkpointed."""
        return self.how

    def classify(self, x: Tensor) -> Tensor | None:
        """As the inner view."""
        return self.vit.classify(x)

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """As the inner view."""
        return self.vit.fingerprint_tensors()

    def source(self) -> Source:
        """As the inner view."""
        return self.vit.source()


class WrappedHierarchicalViT(HierarchicalViT):
    """A hierarchical view whose blocks are wrapped by block adapters, for one forward."""

    def __init__(
        self,
        vit: HierarchicalViT,
        adapters: Sequence[BlockAdapter],
        trace: Trace,
        how: Checkpointing = OFF,
        trained: bool = True,
    ) -> None:
        """``trained``: whether a checkpointed block has something to train."""
        super().__init__(vit.backbone, vit.spec)
        self.vit, self.adapters, self.trace, self.how, self.trained = vit, adapters, trace, how, trained
        self.positions = vit.positions

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """As the inner view."""
        return self.vit.embed(image)

    def enter(self, stage: int, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """As the inner view."""
        return self.vit.enter(stage, x, grid)

    def blocks(self, stage: int, grid: tuple[int, int]) -> Sequence[Any]:
        """Blocks of the inner view, each wrapped in the order given."""
        return _wrap_all(self, self.vit.blocks(stage, grid), sum(self.spec.depths[:stage]), grid)

    def norm(self, x: Tensor) -> Tensor:
        """As the inner view."""
        return self.vit.norm(x)

    def state(self) -> list[tuple[object, str]]:
        """Of the inner view, and of the adapters."""
        return [*self.vit.state(), *_state(self.adapters)]

    def classify(self, x: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """As the inner view."""
        return self.vit.classify(x, grid)

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """As the inner view."""
        return self.vit.fingerprint_tensors()

    def source(self) -> Source:
        """As the inner view."""
        return self.vit.source()
