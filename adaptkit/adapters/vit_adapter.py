"""ViT-Adapter (Chen et al., ICLR 2023): a spatial prior beside a plain ViT, exchanged by deformable attention.

Per interaction i, with tokens x of the ViT and multi-scale tokens c of the spatial prior (paper, eq. 1-3)::

    x = x + gamma_i * attn(norm(x), norm(c))          injector, gamma_i = 0 at the start
    x = block(x)  for the blocks of group i
    c = c + attn(norm(c), norm(x));  c = c + ffn(norm(c))     extractor

The attention is multi-scale deformable; any other mixer of ``adaptkit.mixers`` can stand in its place (``attention=``),
as the paper's table 7 compares. The pyramid has strides 4, 8, 16 and 32. Where the image is padded to a
multiple of the patch for the ViT and of 32 for the prior, both grids keep their place in the image: a reference
point is a pixel position over the extent, in pixels, of the grid that is sampled.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from adaptkit.adapters._recompute import recompute, recompute_part
from adaptkit.adapters._vit_adapter_parts import STRIDES, Grids, Interaction, SpatialPrior
from adaptkit.adapters.base import SideAdapter, Trace
from adaptkit.layers import Norm, check_choice, init_weights, norm2d, norm_map, parameter_dtype
from adaptkit.mixers import list_mixers
from adaptkit.mixers.msda import MSDeformAttn
from adaptkit.ops import batch_norm
from adaptkit.ops.accumulate import add_resampled, add_upsampled
from adaptkit.ops.grid import cells, check_strides, map_to_tokens, pad_to_multiple, resample_map, tokens_to_map
from adaptkit.ops.linear import wide_linear
from adaptkit.registry import register_adapter
from adaptkit.vit import Features, Spec, ViT

__all__ = ["ViTAdapter", "ViTAdapterConfig"]


@dataclass(frozen=True)
class ViTAdapterConfig:
    """Every choice of the official code, with its default; ``None`` is the official value for the backbone's width."""

    injector: bool = True  #: False: extract only, no gradient through the backbone (as DINOv3's adapter does)
    interaction_indexes: tuple[tuple[int, int], ...] | None = None  #: inclusive block ranges; None: four even groups
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
    checkpoint: bool = False  #: recompute what is cheap in the backward pass: half the memory for a little time
    strides: tuple[int, ...] = STRIDES  #: of the maps that are made; without 4, a third of the time is saved
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
        object.__setattr__(self, "strides", check_strides(self.strides, STRIDES))
        if self.extra_extractors is True:  # the official switch is a bool and means two
            object.__setattr__(self, "extra_extractors", 2)
        for option in ("n_points", "conv_inplane", "deform_num_heads", "deform_ratio", "cffn_ratio"):
            value = getattr(self, option)
            if value is not None and value <= 0:
                raise ValueError(f"{option}={value} must be positive")

    def resolve(self, spec: Spec) -> ViTAdapterConfig:
        """Fill in what depends on the backbone. ``ValueError`` where the two do not fit."""
        heads, ratio, drop_path = _preset(spec.dim)
        ratio = ratio if self.deform_ratio is None else self.deform_ratio
        width = int(spec.dim * ratio)
        heads = self.deform_num_heads or (heads if width % heads == 0 else _heads(width))
        groups = self.interaction_indexes or even_groups(spec.depth, 4)
        _check_groups(groups, spec.depth)
        if width == 0 or width % heads:
            raise ValueError(
                f"deform_num_heads={heads} does not divide the value width {width} (deform_ratio={ratio} of "
                f"dim={spec.dim}); choose a divisor of {width}"
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
    """Split 0..depth-1 into (first, last) ranges as even as can be: depth 14 -> 3, 4, 3, 4 blocks."""
    groups = min(groups, depth)
    edges = [round(i * depth / groups) for i in range(groups + 1)]
    return tuple((a, b - 1) for a, b in itertools.pairwise(edges))


def _check_groups(groups: Sequence[tuple[int, int]], depth: int) -> None:
    if [i for a, b in groups for i in range(a, b + 1)] != list(range(depth)) or any(a > b for a, b in groups):
        raise ValueError(
            f"interaction_indexes={tuple(groups)} do not run through the {depth} blocks 0..{depth - 1} once and in "
            "order; give inclusive (first, last) pairs, or None for four even groups"
        )


@register_adapter("vit-adapter", ViTAdapterConfig)
class ViTAdapter(SideAdapter):
    """ViT-Adapter: a spatial prior and deformable attention beside the blocks, strides 4 to 32."""

    strides: tuple[int, ...] = STRIDES

    def __init__(self, spec: Spec, config: ViTAdapterConfig) -> None:
        config = config.resolve(spec)
        super().__init__(spec, config)
        dim, groups = spec.dim, config.interaction_indexes or ()
        self.strides = config.strides
        self.level_embed = nn.Parameter(torch.zeros(3, dim))
        self.spm = SpatialPrior(dim, config.conv_inplane, config.norm, 4 in config.strides, spec.channels)
        extra = [0] * (len(groups) - 1) + [config.extra_extractors]
        self.interactions = nn.ModuleList(Interaction(dim, config, n) for n in extra)
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2) if 4 in config.strides else None
        self.norm1, self.norm2, self.norm3, self.norm4 = (
            norm2d(config.norm, dim) if stride in config.strides else nn.Identity() for stride in STRIDES
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the official code does: the general rule first, deformable attention last."""
        self.apply(init_weights)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)

    def reads(self) -> tuple[int, ...]:
        """The last block of each group."""
        return tuple(last for _, last in self.config.interaction_indexes or ())

    def why_alone(self) -> str:
        """Injectors write into the tokens; without them it only reads."""
        if self.config.injector:
            return "its injectors write into the tokens; injector=False only reads them"
        return "prefix='drop' runs the blocks without prefix tokens" if self.config.prefix == "drop" else ""

    def forward(self, vit: ViT, image: Tensor, trace: Trace) -> Features:
        """Image (B, C, H, W) -> features with maps (B, D, H/s, W/s), s of ``strides``, rounded up."""
        x, blocks = vit.begin(image)
        if self.config.prefix == "drop":
            x = x[:, self._droppable(vit) :]
        c1, *prior = self.spm(pad_to_multiple(image.to(parameter_dtype(self.spm)), STRIDES[-1]))
        levels = [(m.shape[-2], m.shape[-1]) for m in prior]
        grids = Grids.of(vit.grid(image), vit.spec.patch, levels, image)
        c = torch.cat([map_to_tokens(m.add_(e[:, None, None])) for m, e in zip(prior, self.level_embed)], dim=1)

        taps = []
        for interaction, (first, last) in zip(self.interactions, self.config.interaction_indexes):
            x = recompute_part(self.config.checkpoint, interaction.inject, x, c, grids)
            for block in blocks[first : last + 1]:
                x = recompute(self.config.checkpoint, block, x)
            taps.append(self._tap(vit, x, grids))
            c = recompute_part(self.config.checkpoint, interaction.extract, c, taps[-1], grids)
        return vit.finish(x, image, self._pyramid(c1, c, taps, grids, image), trace)

    def _pyramid(self, c1: Tensor, c: Tensor, taps: list[Tensor], grids: Grids, image: Tensor) -> list[Tensor]:
        """Maps at ``strides``: c taken apart, ViT features added, normed, cropped to the image."""
        parts = c.split([h * w for h, w in grids.levels], dim=1)
        maps = {s: tokens_to_map(p, g) for s, p, g in zip(STRIDES[1:], parts, grids.levels)}
        if self.up is not None and self.spm.fc1 is not None:
            maps[4] = add_upsampled(self._finest(self.spm.fc1, c1), maps[8], self.up.weight, self.up.bias)
        norms = dict(zip(STRIDES, (self.norm1, self.norm2, self.norm3, self.norm4)))
        height, width = image.shape[-2:]
        out = []
        for stride in self.strides:
            m = self._add_vit_feature(maps[stride], stride, taps, grids)
            if stride == 4 and batch_norm.suits(norms[stride], m):
                m = batch_norm.norm_large(m, norms[stride])
            else:
                m = norm_map(norms[stride], m, keep=torch.is_grad_enabled())
            out.append(m[..., : cells(height, stride), : cells(width, stride)])
        return out

    @staticmethod
    def _finest(fc1: nn.Conv2d, c1: Tensor) -> Tensor:
        """``fc1(c1)``, (B, inplane, H, W) -> (B, D, H, W): the largest map of all."""
        if torch.is_grad_enabled():
            return fc1(c1)
        return wide_linear(c1.movedim(1, 3), fc1.weight.flatten(1), fc1.bias).movedim(3, 1)

    def _add_vit_feature(self, m: Tensor, stride: int, taps: list[Tensor], grids: Grids) -> Tensor:
        """Add the last tokens, or those of the group at the map's share of the depth, on the map's grid."""
        if self.config.add_vit_feature is None:
            return m
        share, n = 1 + STRIDES.index(stride), len(taps)
        stage = n - 1 if self.config.add_vit_feature == "last" else cells(share * n, len(STRIDES)) - 1
        x, patch = tokens_to_map(taps[stage], grids.tokens), self.spec.patch
        if stride == 4:  # in place: this map is the largest by far, and nobody else's
            return add_resampled(m, x, patch, stride)
        return m + resample_map(x, patch, stride, (m.shape[-2], m.shape[-1]))

    def _tap(self, vit: ViT, x: Tensor, grids: Grids) -> Tensor:
        """Patch tokens as extractors and pyramid read them."""
        x = vit.norm(x) if self.config.tap_norm else x
        return x[:, x.shape[1] - grids.to_prior.shape[0] :].to(self.level_embed.dtype)

    def _droppable(self, vit: ViT) -> int:
        if not vit.prefix_optional:
            raise ValueError(
                f"prefix='drop' needs blocks that run without prefix tokens; those of {vit.spec.family} place their "
                "positions by the prefix. Use prefix='keep'"
            )
        return vit.spec.prefix
