"""What can be chosen of ViT-Split, and the paper's values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from adaptkit.core.layers import Norm, check_choice, check_numbers, indices
from adaptkit.core.view import Spec
from adaptkit.ops.grid import STRIDES, check_strides

__all__ = ["STRIDES", "ViTSplitConfig", "evenly"]


@dataclass(frozen=True)
class ViTSplitConfig:
    """The authors' names and defaults; ``None`` is their value for the backbone's depth."""

    select_layers: tuple[int, ...] | None = None  #: blocks that are copied and trained; None: the last 3, 4 or 8
    out_indices: tuple[int, ...] | None = None  #: blocks whose frozen outputs make the prior; None: every third
    strides: tuple[int, ...] | None = STRIDES  #: of the maps; None: the fused map alone, at the stride of the patch
    norm: Norm = "batch"  #: of the pyramid; "sync" over GPUs
    pad: Literal["corner", "centre"] = "corner"  #: where an image ends that is no multiple of the patch
    checkpoint: bool = False  #: run the copies a second time in the backward pass: less memory for more time

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choice("norm", self.norm, ("batch", "sync", "group", "layer"))
        check_choice("pad", self.pad, ("corner", "centre"))
        for option in ("select_layers", "out_indices"):
            value = getattr(self, option)
            if value is not None:
                object.__setattr__(self, option, indices(option, value))
        if self.strides is not None:
            object.__setattr__(self, "strides", check_strides(self.strides, STRIDES))
            if self.pad == "centre":
                raise ValueError(
                    "pad='centre' goes with strides=None: maps at strides 4 to 32 count from the image's corner"
                )

    def resolve(self, spec: Spec) -> ViTSplitConfig:
        """Fill in what depends on the backbone. ``ValueError`` where the two do not fit."""
        depth = spec.depth
        if depth < 2:
            raise ValueError(f"vit-split copies blocks behind a frozen one and needs two or more; this ViT has {depth}")
        copied = self.select_layers
        copied = tuple(range(depth - _copies(depth), depth)) if copied is None else copied
        taps = evenly(depth) if self.out_indices is None else self.out_indices
        _check_copied(copied, depth)
        _check_taps(taps, depth)
        return replace(self, select_layers=copied, out_indices=taps)


def _copies(depth: int) -> int:
    """The published numbers for 12, 24 and 40 blocks; at most half of a shallow backbone."""
    return min(3 if depth < 24 else 4 if depth < 40 else 8, depth // 2)


def evenly(depth: int) -> tuple[int, ...]:
    """Every third block up to the last: 2, 5, 8, 11 of 12; 2, 5, ..., 23 of 24; of 40 and more the last third."""
    count = max(depth // 3, min(2, depth - 1))
    start = depth - count if depth >= 40 else min(2, depth - count)
    return tuple(start + (i * (depth - 1 - start)) // max(count - 1, 1) for i in range(count))


def _check_copied(copied: Sequence[int], depth: int) -> None:
    ascending = all(a < b for a, b in itertools.pairwise(copied))
    if not copied or not ascending or copied[0] < 1 or copied[-1] >= depth:
        raise ValueError(
            f"select_layers={_few(copied)} must be blocks 1 to {depth - 1} in ascending order: the first copy runs on "
            "what the block before it gives"
        )


def _check_taps(taps: Sequence[int], depth: int) -> None:
    if not taps or len(taps) > depth or not all(0 <= i < depth for i in taps):
        raise ValueError(f"out_indices={_few(taps)} must be 1 to {depth} of the blocks 0 to {depth - 1}")


def _few(indices: Sequence[int]) -> str:
    return str([*indices]) if len(indices) <= 40 else f"[{', '.join(map(str, indices[:8]))}, ...]"
