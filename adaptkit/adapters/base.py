"""The kinds of adapter, and how they stack.

A *block adapter* wraps one frozen block; any number of them, in the order given. A *side adapter* runs a stream
beside the blocks and owns the loop over them; at most one. Both can be attached at once: the side adapter then sees
wrapped blocks. A forward writes nothing to ``self``: what an adapter reports goes into ``aux``, a dict of tensors
made for this forward and returned as ``Features.aux``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from adaptkit.core.block import Block, Fn
from adaptkit.core.checkpointing import Aux
from adaptkit.core.proxy import LayerProxy
from adaptkit.core.view import Features, View, ViT

__all__ = [
    "Adapter",
    "Aux",
    "BlockAdapter",
    "Openable",
    "SideAdapter",
    "WeightAdapter",
]


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
    def wrap(self, block: Block, index: int, aux: Aux) -> Fn:
        """Return what runs in place of block ``index``: (B, P+N, D) -> (B, P+N, D).

        Called once more, with aux outputs of its own, where a checkpointed block runs again in the backward pass.
        """

    def must_repeat(self, aux: Aux) -> bool:
        """Return whether the forward that filled these must run again, with none.

        Called once after each forward. Entries that only the adapter needs are removed here. May return
        True only where every block is ``repeatable``.
        """
        return False


class Openable(BlockAdapter):
    """A block adapter that can step aside for a while."""

    switches: ClassVar[tuple[str, ...]] = ("open",)
    open: bool = False  #: whether the blocks run as the backbone's own

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Leave out all that the adapter does: the pretrained model, bit for bit."""
        before, self.open = self.open, True
        try:
            yield
        finally:
            self.open = before


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
    def forward(self, vit: ViT, image: Tensor, aux: Aux) -> Features:
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
