"""The one view of a frozen vision transformer.

Every backbone is tokens, blocks of one equation (:mod:`adaptkit.core.block`) and a norm. A family file in
``adaptkit/backbones`` says how one backbone is seen this way. It calls the backbone's own modules and copies nothing,
so that the view equals the backbone bitwise.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from adaptkit.core.block import Block
from adaptkit.core.checkpointing import OFF, Checkpointing
from adaptkit.core.shown import Rows, as_html, as_text
from adaptkit.ops.grid import cells, pad_to_multiple
from adaptkit.seam import modes

__all__ = [
    "Features",
    "Source",
    "Spec",
    "ViT",
    "View",
    "renamed",
]

T = TypeVar("T", bound=type)


def renamed(**names: str) -> Callable[[T], T]:
    """Class decorator: attributes by their old names, ``renamed(old="new")``, which work and warn."""

    def of(old: str, new: str) -> property:
        def read(self: Any) -> Any:
            what = f"{type(self).__name__}.{old}"
            warnings.warn(f"{what} is called {new} now; the old name will go", DeprecationWarning, stacklevel=2)
            return getattr(self, new)

        return property(read, doc=f"Old name of ``{new}``.")

    def add(cls: T) -> T:
        for old, new in names.items():
            setattr(cls, old, of(old, new))
        return cls

    return add


@renamed(dim="embed_dim", heads="num_heads", patch="patch_size", prefix="num_prefix_tokens")
class Spec(NamedTuple):
    """What an adapter may depend on, and what its file stores."""

    family: str  #: how the backbone is seen, e.g. ``"timm-vit"``; never a condition for compatibility
    embed_dim: int  #: width D of the token stream
    depth: int  #: number of blocks
    num_heads: int  #: attention heads per block
    patch_size: int  #: side of a square patch, in pixels
    num_prefix_tokens: int  #: class and register tokens P before the patch tokens
    channels: int = 3  #: of the image; a file that does not say has 3

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each block."""
        return (self.embed_dim,) * self.depth


class Source(NamedTuple):
    """Where a backbone comes from, as far as it knows itself; empty where it does not."""

    id: str = ""  #: Hub id, timm name or local folder
    revision: str = ""  #: commit, where recorded
    mean: tuple[float, ...] = ()  #: normalisation of the image, channel by channel, for values in 0..1
    std: tuple[float, ...] = ()
    classes: int = 0  #: of the backbone's own classifier
    resize: int = 0  #: how images were framed: the shorter side, in pixels, is brought to this; 0: not known
    crop: int = 0  #: then a square of this side is cut from the middle
    squash: bool = False  #: both sides are brought to ``crop``, whatever the shape
    interpolation: str = ""  #: "bilinear", "bicubic", ...


class Features(NamedTuple):
    """What a forward returns. A pytree: ``torch.compile``, ``torch.export`` and DDP take it as it is."""

    tokens: Tensor  #: (B, N, D) patch tokens after the final norm, N = h * w row by row
    prefix: Tensor  #: (B, P, D) class and register tokens after the final norm
    maps: tuple[Tensor, ...]  #: pyramid, finest first: (B, D, H/4, W/4) ... (B, D, H/32, W/32); () if none is made
    aux: dict[str, Tensor]  #: what adapters report, e.g. usage for a usage loss
    logits: Tensor | None  #: of the head given to ``attach``, or of the backbone's own classifier
    grid: tuple[int, int]  #: (h, w) of the patch tokens: the image size over the patch, rounded up
    size: tuple[int, int]  #: (H, W) of the image, in pixels
    #: (B, P+N, D) tokens after the blocks that the head ``reads()``, after the final norm; () where it reads none
    intermediates: tuple[Tensor, ...] = ()

    def _shown(self) -> tuple[str, Rows]:
        """Shapes, not values."""
        rows = [("tokens", _shape(self.tokens)), ("prefix", _shape(self.prefix))]
        if self.maps:
            rows.append(("maps", "; ".join(map(_shape, self.maps))))
        rows += [(f"aux {name}", _shape(value)) for name, value in self.aux.items()]
        rows.append(("logits", _shape(self.logits)))
        size, grid = (f"{height} x {width}" for height, width in (self.size, self.grid))
        return f"Features of images of {size} pixels, {grid} patches", rows

    def __repr__(self) -> str:
        return as_text(*self._shown())

    def _repr_html_(self) -> str:
        return as_html(*self._shown())


def _shape(value: Any) -> str:
    """Shape, dtype and device of a tensor; the keys of what is made of several."""
    if isinstance(value, Tensor):
        shape = " x ".join(map(str, value.shape)) or "a number"
        return f"{shape}, {str(value.dtype).removeprefix('torch.')}, {value.device}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_shape(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_shape, value))
    return "none" if value is None else type(value).__name__


@renamed(host="backbone")
class View(ABC):
    """How a frozen backbone is seen, plain or hierarchical. It holds no parameter: all is read from ``backbone``.

    A family implements the abstract methods. Four more are what ``adaptkit.model.proof`` asks a copy of it for,
    which shares its weights and is in eval mode; a family that leaves them out is proven block by block only. The
    others are final.
    """

    positions: str = "none"  #: how position embeddings are resampled to another grid
    position_rules: tuple[str, ...] = ()  #: the rules that :meth:`follow` accepts, the backbone's own among them
    replayed: bool = False  #: whether the backbone has already run and this view returns its stored outputs
    tupled: bool = False  #: whether the backbone's block modules return ``(tokens, ...)`` and not the tokens alone
    spec: Any  #: Spec of a plain ViT, HierarchicalSpec of a hierarchical backbone

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self.sharded: Sequence[nn.Module] = ()  #: the backbone's blocks, where their parameters lie on several devices
        # Of the weights, from before they were sharded: see adaptkit.hub.backbone and adaptkit.hub.digest.
        self.fingerprint: dict[str, list[float]] | None = None
        self.digest: dict[str, str] | None = None
        self.sums: dict[str, list[float]] | None = None
        self.checkpointing: Checkpointing | None = None  #: what the model was told; None: as the backbone says
        self.origin: Source | None = None  #: what a module around the backbone knows better than the backbone

    @abstractmethod
    def features(self, image: Tensor) -> Features:
        """Image (B, C, H, W) of any size -> features of the plain forward, no adapter."""

    @abstractmethod
    def logits(self, features: Features) -> Tensor | None:
        """Return the backbone's own logits (B, classes), or None."""

    def is_checkpointing(self) -> bool:
        """Whether the backbone was told to run its blocks a second time in the backward pass."""
        return False

    def state(self) -> list[tuple[object, str]]:
        """Return what a forward of the blocks reads of modules, for :func:`adaptkit.seam.bound`."""
        return modes(self.backbone.modules())

    def how_checkpointing(self) -> Checkpointing:
        """Return which blocks run a second time: what the model was told goes before what the backbone was."""
        if self.checkpointing is not None:
            return self.checkpointing
        return Checkpointing() if self.is_checkpointing() else OFF

    def check_image(self, image: Tensor) -> None:
        """Raise ``ValueError`` for an image (B, C, H, W) of another number of channels than the backbone takes."""
        if image.shape[1] != self.spec.channels:
            raise ValueError(
                f"image has shape {tuple(image.shape)}, so {image.shape[1]} channels; {type(self.backbone).__name__} "
                f"takes {self.spec.channels}: give (batch, {self.spec.channels}, height, width)"
            )

    @abstractmethod
    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """Return a few frozen tensors that every copy of these weights shares, whichever library holds them."""

    @abstractmethod
    def source(self) -> Source:
        """Return what the backbone knows of its origin."""

    def follow(self, rule: str) -> None:
        """Resample position embeddings by this rule from now on, whatever the backbone does itself.

        At the backbone's own grid nothing changes. Raises ``ValueError`` for a rule that this family does not know.
        """
        if rule not in (self.positions, *self.position_rules):
            known = " or ".join(map(repr, self.position_rules or (self.positions,)))
            raise ValueError(
                f"positions={rule!r}: position embeddings of {type(self.backbone).__name__} are resampled as {known}"
            )
        self.positions = rule

    def sizes(self) -> Sequence[tuple[int, int]]:
        """Return image sizes (H, W) in pixels that the backbone accepts, its own first; ``()``: compare no forward."""
        return ()

    def reference(self, image: Tensor) -> Tensor | None:
        """Run the backbone's own forward: image (1, C, H, W), of one of :meth:`sizes` -> tokens (1, P+N or N, D).

        :meth:`features` must give the same tokens: after the final norm, prefix tokens first. The proof calls it on a
        copy whose blocks are replaced by cheap functions.
        """
        return None

    def answers(self, tokens: Tensor) -> Sequence[Tensor]:
        """Tokens as :meth:`reference` gives them -> tensors, one of which the backbone's own forward must return.

        ``()``: what the backbone returns is not compared.
        """
        return ()

    def accept(self, grid: tuple[int, int]) -> None:  # noqa: B027
        """Make the backbone's blocks take this grid by their own forward, whatever grid they were built for."""


class ViT(View):
    """The view of a plain ViT: one width and one grid from the first block to the last."""

    spec: Spec
    prefix_optional: bool = True  #: whether the blocks also run without the prefix tokens
    splits: bool = True  #: whether the attention of the blocks comes apart into ``qkv``, ``bias`` and ``out``
    rebuilds: bool = False  #: whether the view computes that attention from its parts itself, on some grids

    def __init__(self, backbone: nn.Module, spec: Spec) -> None:
        super().__init__(backbone)
        self.spec = spec

    @abstractmethod
    def embed(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """Image (B, C, h*patch, w*patch) -> tokens (B, P+N, D) as they enter the first block."""

    @abstractmethod
    def blocks(self, image: Tensor, grid: tuple[int, int]) -> Sequence[Block]:
        """Return the blocks, bound to this (padded) image."""

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """Apply the backbone's final norm to (B, P+N, D); the identity where the backbone has none."""

    @abstractmethod
    def classify(self, x: Tensor) -> Tensor | None:
        """Normed tokens (B, P+N, D) -> the backbone's own logits (B, classes), or None where it has no classifier."""

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token: registers alone sum up nothing that a head reads."""
        return self.spec.num_prefix_tokens > 0

    def grid(self, image: Tensor) -> tuple[int, int]:
        """Return (h, w), the patches that cover the image (B, C, H, W)."""
        return cells(image.shape[-2], self.spec.patch_size), cells(image.shape[-1], self.spec.patch_size)

    def begin(self, image: Tensor) -> tuple[Tensor, Sequence[Block]]:
        """Image (B, C, H, W) of any size -> tokens (B, P+N, D) before the first block, and the blocks.

        A size that is no multiple of the patch is padded with zeros at the right and the bottom.
        """
        self.check_image(image)
        grid = self.grid(image)
        image = pad_to_multiple(image.to(next(self.backbone.parameters()).dtype), self.spec.patch_size)
        return self.embed(image, grid), self.blocks(image, grid)

    def finish(
        self, x: Tensor, image: Tensor, maps: Sequence[Tensor] = (), aux: dict[str, Tensor] | None = None
    ) -> Features:
        """Close the forward: final norm, prefix and patch tokens apart. x: (B, P+N, D), or (B, N, D) if dropped."""
        grid = self.grid(image)
        x = self.norm(x)
        prefix, tokens = x.tensor_split([x.shape[1] - grid[0] * grid[1]], dim=1)
        size = (image.shape[-2], image.shape[-1])
        return Features(tokens, prefix, tuple(maps), dict(aux or {}), None, grid, size)

    def features(self, image: Tensor, reads: Sequence[int] = ()) -> Features:
        """Run the plain forward, no adapter: begin, every block, finish.

        ``reads``: the blocks whose outputs are kept as ``intermediates``, after the final norm.
        """
        x, blocks = self.begin(image)
        intermediates = []
        for index, block in enumerate(blocks):
            x = block(x)
            if index in reads:
                intermediates.append(self.norm(x))
        return self.finish(x, image)._replace(intermediates=tuple(intermediates))

    def logits(self, features: Features) -> Tensor | None:
        """Return the backbone's own logits (B, classes); None without a classifier or where the prefix was dropped."""
        if features.prefix.shape[1] != self.spec.num_prefix_tokens:
            return None
        tokens = features.tokens  # as they lie in memory, where there is no prefix: a mean over them rounds by that
        return self.classify(torch.cat([features.prefix, tokens], dim=1) if self.spec.num_prefix_tokens else tokens)
