"""What views of transformers' hierarchical models share: provenance, and stages that begin with a block that pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import HfView, hf_source
from adaptkit.backbones._timm import pair
from adaptkit.core.hierarchical import HierarchicalSpec, HierarchicalViT

__all__ = ["HfHierarchical", "depths_but_entries"]


class HfHierarchical(HfView, HierarchicalViT):
    """A transformers base model of several stages."""

    def __init__(self, backbone: Any, spec: HierarchicalSpec) -> None:
        super().__init__(backbone, spec)
        self.origin = hf_source(backbone, spec.channels)

    def classify(self, x: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """As the class with a classifier does it; None for a base model."""
        return None if self.head is None else self.head(self.backbone, x)

    def sizes(self) -> Sequence[tuple[int, int]]:
        """The backbone's own."""
        return [pair(self.body.config.image_size)]

    def answers(self, tokens: Tensor) -> Sequence[Tensor]:
        """The logits, where there is a classifier."""
        logits = self.classify(tokens, (0, 0))
        return () if logits is None else (logits,)


def depths_but_entries(blocks: tuple[int, ...], pooled: tuple[bool, ...], name: str) -> tuple[int, ...]:
    """Return the blocks of each stage without the one that pools on entering it.

    Raises ``TypeError`` where a stage has no other.
    """
    depths = tuple(count - into for count, into in zip(blocks, pooled))
    if 0 in depths:
        raise TypeError(
            f"stages {list(blocks)} of this {name}: one has no block but the one that halves the map, so there is none "
            "of the form x + attn(norm(x)), x + mlp(norm(x)) in it; use one with two blocks or more in each stage"
        )
    return depths
