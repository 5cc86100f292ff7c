"""The one view of a frozen hierarchical backbone: stages of blocks, each with its width and its grid.

Per stage s, with tokens x on a grid (h, w), row by row::

    x, grid = enter_s(x, grid)         downsampling; the identity in the first stage
    x = block(x)   for the blocks of stage s
    maps.append(x as a map)

A block is the same :class:`~adaptkit.core.block.Block` as in a plain ViT: it takes and gives tokens (B, h*w, D_s), so
an adapter that acts around one block need not know which kind of backbone it is on. There are no prefix tokens.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from adaptkit.core.block import Block
from adaptkit.core.view import Features, View, renamed
from adaptkit.ops.grid import pad_to_multiple, tokens_to_map

__all__ = ["HierarchicalSpec", "HierarchicalViT"]

Grid = tuple[int, int]


@renamed(dims="embed_dims", dim="embed_dim", patch="patch_size", prefix="num_prefix_tokens")
class HierarchicalSpec(NamedTuple):
    """What an adapter may depend on, and what its file stores, for a backbone of several stages."""

    family: str  #: how the backbone is seen; never a condition for compatibility
    embed_dims: tuple[int, ...]  #: width D of each stage
    depths: tuple[int, ...]  #: blocks of each stage
    strides: tuple[int, ...]  #: side of a token of each stage, in pixels
    channels: int = 3  #: of the image; a file that does not say has 3

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(self.depths)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each block."""
        return tuple(dim for dim, depth in zip(self.embed_dims, self.depths) for _ in range(depth))

    @property
    def embed_dim(self) -> int:
        """Width of the tokens that leave the backbone."""
        return self.embed_dims[-1]

    @property
    def patch_size(self) -> int:
        """Side of the tokens that leave the backbone, in pixels."""
        return self.strides[-1]

    @property
    def num_prefix_tokens(self) -> int:
        """There is no class token."""
        return 0


class HierarchicalViT(View):
    """The view of a hierarchical backbone. It holds no parameter. A family implements the abstract methods."""

    spec: HierarchicalSpec

    def __init__(self, backbone: nn.Module, spec: HierarchicalSpec) -> None:
        super().__init__(backbone)
        self.spec = spec

    @abstractmethod
    def embed(self, image: Tensor) -> tuple[Tensor, Grid]:
        """Image (B, C, H, W), sides multiples of the first stride -> tokens (B, h*w, D_0) and their grid."""

    @abstractmethod
    def enter(self, stage: int, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """Tokens as stage ``stage - 1`` leaves them -> tokens (B, h*w, D) as the blocks of ``stage`` get them."""

    @abstractmethod
    def blocks(self, stage: int, grid: Grid) -> Sequence[Block]:
        """Return the blocks of a stage, bound to its grid."""

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """Apply the backbone's final norm to the last tokens; the identity where it norms after pooling."""

    @abstractmethod
    def classify(self, x: Tensor, grid: Grid) -> Tensor | None:
        """Normed tokens of the last stage -> the backbone's own logits (B, classes), or None without a classifier."""

    def features(self, image: Tensor) -> Features:
        """Image (B, C, H, W) of any size -> features; the maps are what the stages give, before the final norm.

        A size that is no multiple of the first stride is padded with zeros at the right and the bottom.
        """
        self.check_image(image)
        size = (image.shape[-2], image.shape[-1])
        image = pad_to_multiple(image.to(next(self.backbone.parameters()).dtype), self.spec.strides[0])
        x, grid = self.embed(image)
        maps = []
        for stage in range(len(self.spec.depths)):
            x, grid = self.enter(stage, x, grid)
            for block in self.blocks(stage, grid):
                x = block(x)
            maps.append(tokens_to_map(x, grid).contiguous())
        x = self.norm(x)
        return Features(x, x[:, :0], tuple(maps), {}, None, grid, size)

    def logits(self, features: Features) -> Tensor | None:
        """Return the backbone's own logits (B, classes); None without a classifier."""
        return self.classify(features.tokens, features.grid)


def __getattr__(name: str) -> Any:
    if name in ("StagedSpec", "StagedViT"):
        new = {"StagedSpec": HierarchicalSpec, "StagedViT": HierarchicalViT}[name]
        warnings.warn(f"{name} is called {new.__name__} now; the old name will go", DeprecationWarning, stacklevel=2)
        return new
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
