"""What can be chosen of the plain mask decoder, and the paper's values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from adaptkit.core.layers import check_choice, check_numbers, check_positive, indices
from adaptkit.core.view import Spec

__all__ = ["PlainMaskHeadConfig", "even_layers"]

TASKS = ("semantic", "instance", "panoptic")
LEVELS = 4  #: frozen blocks that every published decoder reads


@dataclass(frozen=True)
class PlainMaskHeadConfig:
    """``num_classes`` of the task, and the authors' choices by their names; ``None`` follows the backbone."""

    num_classes: int
    task: Literal["semantic", "instance", "panoptic"] = "semantic"  #: how the queries are read; they are trained alike
    things: tuple[int, ...] = ()  #: panoptic: labels of which each query is a segment by itself
    interaction_indices: tuple[int, ...] | None = None  #: frozen blocks that are read; None: four, evenly spaced
    num_q: int = 100  #: queries; the authors have 200 on COCO
    num_blocks: int = 6
    num_heads: int | None = None  #: of the blocks; None: the backbone's
    hidden_dim: int | None = None  #: of their MLP; None: the backbone's width D
    lateral_projection: Literal["mlp", "linear", "identity"] = "mlp"
    residual_projection: bool = True  #: whether a level is added to its projection
    lateral_bn: bool = True  #: BatchNorm of each level
    norm: Literal["batch", "sync"] = "batch"  #: its statistics; "sync" over GPUs
    upscale: int | None = None  #: times the masks are doubled; None: patch 16 twice, to stride 4, patch 14 once
    masked_attention: bool = True  #: in training a query reads the patches of its own mask, and every block is trained

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choice("task", self.task, TASKS)
        check_choice("lateral_projection", self.lateral_projection, ("mlp", "linear", "identity"))
        check_choice("norm", self.norm, ("batch", "sync"))
        check_positive(self, "num_classes", "num_q", "num_blocks", "num_heads", "hidden_dim")
        if self.upscale is not None and not 0 <= self.upscale <= 6:
            raise ValueError(f"upscale={self.upscale}: masks are doubled 0 to 6 times")
        if self.interaction_indices is not None:
            object.__setattr__(self, "interaction_indices", indices("interaction_indices", self.interaction_indices))
        object.__setattr__(self, "things", tuple(sorted(set(self.things))))
        strange = [label for label in self.things if not 0 <= label < self.num_classes]
        if strange:
            raise ValueError(
                f"things holds the label {strange[0]}, and there are {self.num_classes} classes, from 0 on"
            )

    def resolve(self, spec: Spec) -> PlainMaskHeadConfig:
        """Fill in what depends on the backbone. ``ValueError`` where the two do not fit."""
        layers = even_layers(spec.depth) if self.interaction_indices is None else tuple(self.interaction_indices)
        if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < spec.depth:
            raise ValueError(
                f"interaction_indices={list(layers)[:8]} are not some of the {spec.depth} blocks 0..{spec.depth - 1}, "
                "each once and in order"
            )
        heads = self.num_heads or spec.num_heads
        if spec.embed_dim % heads or spec.embed_dim // heads % 4:
            raise ValueError(
                f"num_heads={heads} of a backbone of width {spec.embed_dim}: a head needs a multiple of four channels, "
                "two angles for each axis; give another num_heads"
            )
        if self.lateral_projection == "mlp" and spec.embed_dim < 2:
            raise ValueError(f"a backbone of width {spec.embed_dim} has no half; use lateral_projection='linear'")
        return replace(
            self,
            interaction_indices=layers,
            num_heads=heads,
            hidden_dim=self.hidden_dim or spec.embed_dim,
            upscale=max(1, math.floor(math.log2(spec.patch_size)) - 2) if self.upscale is None else self.upscale,
        )


def even_layers(depth: int) -> tuple[int, ...]:
    """Return the last block of each quarter: of 12 the blocks 2, 5, 8 and 11, as published."""
    return tuple(sorted({(i + 1) * depth // LEVELS - 1 for i in range(LEVELS)} - {-1}))
