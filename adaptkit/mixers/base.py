"""The two forms of a mixer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from adaptkit.ops.grid import pairs

__all__ = ["CrossMixer", "Layout", "Mixer", "even_heads"]


class Mixer(nn.Module, ABC):
    """The self form: every place of a map gets something of the others. Built as ``Mixer(dim, **options)``."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), on a grid of any size."""


class Layout(NamedTuple):
    """Where queries and values of a cross mixer lie in one image."""

    queries: tuple[tuple[int, int], ...]  #: (h, w) of the grids that the queries fill, one after another
    values: tuple[tuple[int, int], ...]  #: (h, w) of the levels, one after another
    points: Tensor  #: (Q, 2) centre of each query as (x, y), 0..1 over the extent of the levels
    sizes: Tensor | None = None  #: (L, 2) width and height of the levels in cells, where they are at hand

    def cells(self) -> Tensor:
        """Return width and height (L, 2) of the levels, in cells."""
        return pairs([(w, h) for h, w in self.values], self.points) if self.sizes is None else self.sizes


class CrossMixer(nn.Module, ABC):
    """The cross form: queries read maps."""

    reads_query: ClassVar[bool] = True  #: False: only the places of the queries matter, not what they hold

    @abstractmethod
    def forward(self, query: Tensor, feat: Tensor, layout: Layout) -> Tensor:
        """Query (B, Q, D), feat (B, S, D) with S the cells of all levels -> (B, Q, D)."""


def even_heads(width: int, channels: int) -> int:
    """Return how many heads of ``channels`` channels fit, or the next smaller number that divides ``width``."""
    return next(h for h in range(max(1, width // channels), 0, -1) if width % h == 0)
