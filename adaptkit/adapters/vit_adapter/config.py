"""What can be chosen of ViT-Adapter, and the paper's values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from adaptkit.core.layers import Norm, check_choice, check_numbers
from adaptkit.core.view import Spec
from adaptkit.mixers import list_mixers
from adaptkit.ops.grid import STRIDES, check_strides

__all__ = ["STRIDES", "ViTAdapterConfig", "even_groups"]


@dataclass(frozen=True)
class ViTAdapterConfig:
    """Every choice of the official code, with its default; ``None`` is the official value for the backbone's width."""

    injector: bool = True  #: False: extract only, no gradient through the backbone (as DINOv3's adapter does)
    #: False: none of them, so the pyramid is the spatial prior plus the tokens (table 6, variants 1 and 2)
    extractor: bool = True
    interactions: int | None = None  #: N of table 6, even groups of blocks; None: 4, or those of interaction_indexes
    interaction_indexes: tuple[tuple[int, int], ...] | None = None  #: inclusive block ranges; None: even groups
    conv_inplane: int = 64  #: channels of the spatial prior's stem
    n_points: int = 4  #: sampling points per head and level
    deform_num_heads: int | None = None
    deform_ratio: float | None = None  #: width of the values over D
    with_cffn: bool = True  #: the extractor's convolutional FFN
    cffn_ratio: float = 0.25  #: its hidden width over D
    gamma_init: float = 0.0  #: 0 leaves the backbone as it was pretrained
    extra_extractors: int = 2  #: further extractors after the last group
    add_vit_feature: Literal["last", "per-stage"] | None = "per-stage"  #: tokens added to the pyramid
    tap_norm: bool | None = None  #: final norm on the tokens that are read; None: only without injector
    prefix: Literal["keep", "drop"] = "keep"  #: class and register tokens in the blocks; the official code drops them
    norm: Norm = "batch"  #: of the spatial prior and the pyramid; "sync" over GPUs
    drop_path: float | None = None  #: in the extractors, constant over depth
    #: recompute all but attention in the backward pass: about a third less memory for a third more time
    checkpoint: bool = False
    strides: tuple[int, ...] = STRIDES  #: of the maps to make; the one at stride 4 takes the most memory
    attention: str = "msda"  #: a mixer of ``adaptkit.mixers``: "msda", "global", "window", "pool", ...

    def __post_init__(self) -> None:
        if self.add_vit_feature is False:  # the official switch is a bool; True would not say which
            object.__setattr__(self, "add_vit_feature", None)
        check_choice("attention", self.attention, tuple(list_mixers()))
        check_choice("add_vit_feature", self.add_vit_feature, ("last", "per-stage", None))
        check_choice("prefix", self.prefix, ("keep", "drop"))
        check_choice("norm", self.norm, ("batch", "sync", "group", "layer"))
        if self.interaction_indexes is not None:  # JSON knows lists only
            pairs = tuple((int(a), int(b)) for a, b in self.interaction_indexes)
            object.__setattr__(self, "interaction_indexes", pairs)
            if self.interactions not in (None, len(pairs)):
                raise ValueError(
                    f"interactions={self.interactions}, and interaction_indexes has {len(pairs)} ranges; give one"
                )
        object.__setattr__(self, "strides", check_strides(self.strides, STRIDES))
        if self.extra_extractors is True:  # the official switch is a bool and means two
            object.__setattr__(self, "extra_extractors", 2)
        if not self.extractor and self.add_vit_feature is None:
            raise ValueError(
                "extractor=False leaves the tokens out of the pyramid, and add_vit_feature=None does too: nothing of "
                "the backbone would be in it; give add_vit_feature='per-stage' or 'last'"
            )
        check_numbers(self)
        for option in ("interactions", "n_points", "conv_inplane", "deform_num_heads", "deform_ratio", "cffn_ratio"):
            value = getattr(self, option)
            if value is not None and value <= 0:
                raise ValueError(f"{option}={value} must be positive")
        if self.extra_extractors < 0:
            raise ValueError(f"extra_extractors={self.extra_extractors} must be 0 or more")
        if self.drop_path is not None and not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path} must be at least 0 and below 1; None is the official value")

    def resolve(self, spec: Spec) -> ViTAdapterConfig:
        """Fill in what depends on the backbone. ``ValueError`` where the two do not fit."""
        heads, ratio, drop_path = _preset(spec.embed_dim)
        ratio = ratio if self.deform_ratio is None else self.deform_ratio
        width = int(spec.embed_dim * ratio)
        heads = self.deform_num_heads or (heads if width % heads == 0 else _heads(width))
        groups = self.interaction_indexes or even_groups(spec.depth, self.interactions or 4)
        if self.interactions is not None and len(groups) < self.interactions:
            raise ValueError(f"interactions={self.interactions} are more than the {spec.depth} blocks; give fewer")
        _check_groups(groups, spec.depth)
        if width == 0 or width % heads:
            raise ValueError(
                f"deform_num_heads={heads} does not divide the value width {width} (deform_ratio={ratio} of "
                f"dim={spec.embed_dim}); choose a divisor of {width}"
            )
        return replace(
            self,
            interaction_indexes=groups,
            deform_num_heads=heads,
            deform_ratio=ratio,
            tap_norm=not self.injector if self.tap_norm is None else self.tap_norm,
            drop_path=drop_path if self.drop_path is None else self.drop_path,
        )


def _preset(dim: int) -> tuple[int, float, float]:
    """Deformable heads, value ratio and drop path of the official T, S, B and L; the nearest rule elsewhere."""
    official = {192: (6, 1.0, 0.1), 384: (6, 1.0, 0.2), 768: (12, 0.5, 0.3), 1024: (16, 0.5, 0.4)}
    if dim in official:
        return official[dim]
    ratio, drop_path = (1.0, 0.2) if dim < 768 else (0.5, 0.4)
    return _heads(int(dim * ratio)), ratio, drop_path


def _heads(width: int) -> int:
    """Heads of 32 channels, or the nearest larger size that divides the width."""
    return next(h for h in range(max(1, width // 32), 0, -1) if width % h == 0)


def even_groups(depth: int, groups: int) -> tuple[tuple[int, int], ...]:
    """Split 0..depth-1 into (first, last) ranges as even as can be: depth 14 -> 4, 3, 3, 4 blocks."""
    groups = min(groups, depth)
    edges = [round(i * depth / groups) for i in range(groups + 1)]
    return tuple((a, b - 1) for a, b in itertools.pairwise(edges))


def _check_groups(groups: Sequence[tuple[int, int]], depth: int) -> None:
    firsts, lasts = [a for a, _ in groups], [b for _, b in groups]
    if [*firsts, depth] != [0, *(b + 1 for b in lasts)] or any(a > b for a, b in groups):
        raise ValueError(
            f"interaction_indexes={tuple(groups)} do not run through the {depth} blocks 0..{depth - 1} once and in "
            "order; give inclusive (first, last) pairs, or None for four even groups"
        )
