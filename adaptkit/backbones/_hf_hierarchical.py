"""What views of transformers' hierarchical models share: provenance, and stages that begin with a block that pools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from adaptkit.backbones._hf import hf_source
from adaptkit.core.hierarchical import HierarchicalSpec, HierarchicalViT
from adaptkit.core.view import Source

__all__ = ["HfHierarchical", "depths_but_entries"]


class HfHierarchical(HierarchicalViT):
    """A transformers base model of several stages, alone or in the class that adds a classifier."""

    inside: str = ""  #: attribute of the backbone that holds the base model; "": it is one
    head: Callable[[Any, Tensor], Tensor] | None = None  #: backbone, its last tokens (B, N, D) -> logits (B, classes)

    def __init__(self, backbone: Any, spec: HierarchicalSpec) -> None:
        super().__init__(backbone, spec)
        self.origin = hf_source(backbone, spec.channels)

    @property
    def body(self) -> Any:
        """The base model."""
        return getattr(self.backbone, self.inside) if self.inside else self.backbone

    def classify(self, x: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """As the class with a classifier does it; None for a base model."""
        return None if self.head is None else self.head(self.backbone, x)

    def source(self) -> Source:
        """From the config, and the normalisation from the image processor beside the weights, read once."""
        return self.origin or Source()


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
