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
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptkit.adapters.base import SideAdapter, Trace
from adaptkit.layers import DropPath, Norm, check_choice, init_weights, norm2d, parameter_dtype
from adaptkit.mixers import CrossMixer, Layout, cross_mixer, list_mixers
from adaptkit.mixers.msda import MSDeformAttn
from adaptkit.ops.grid import cell_centres, cells, map_to_tokens, pad_to_multiple, resample_map, tokens_to_map
from adaptkit.registry import register_adapter
from adaptkit.vit import Features, Spec, ViT

__all__ = ["ViTAdapter", "ViTAdapterConfig"]

STRIDES = (4, 8, 16, 32)
EPS = 1e-6  # of every LayerNorm, as in the official code


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
    checkpoint: bool = False  #: recompute the groups in the backward pass: less memory, more time
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


class Grids(NamedTuple):
    """Where the tokens of x and of c lie in one image."""

    tokens: tuple[int, int]  #: (h, w) of x
    levels: tuple[tuple[int, int], ...]  #: (h, w) of the three parts of c, strides 8, 16, 32
    to_prior: Tensor  #: (N, 2) centre of each token of x, as (x, y) over the extent of c
    to_tokens: Tensor  #: (M, 2) centre of each token of c, over the extent of x

    @staticmethod
    def of(tokens: tuple[int, int], patch: int, levels: Sequence[tuple[int, int]], image: Tensor) -> Grids:
        """Lay out both grids for a token grid, its patch and the levels of the prior."""
        device, dtype = image.device, torch.promote_types(image.dtype, torch.float32)
        x = cell_centres(tokens, patch, device, dtype)
        c = torch.cat([cell_centres(g, s, device, dtype) for g, s in zip(levels, STRIDES[1:])])
        extent_x = x.new_tensor([tokens[1] * patch, tokens[0] * patch])
        extent_c = x.new_tensor([levels[0][1] * STRIDES[1], levels[0][0] * STRIDES[1]])
        return Grids(tokens, tuple(levels), x / extent_c, c / extent_x)

    def injection(self) -> Layout:
        """Tokens of x read the levels of c."""
        return Layout((self.tokens,), self.levels, self.to_prior)

    def extraction(self) -> Layout:
        """Tokens of c read the map of x."""
        return Layout(self.levels, (self.tokens,), self.to_tokens)


def _attention(dim: int, levels: int, config: Any) -> CrossMixer:
    heads, points, ratio = config.deform_num_heads, config.n_points, config.deform_ratio
    return cross_mixer(config.attention, dim, levels=levels, heads=heads, points=points, ratio=ratio)


class Injector(nn.Module):
    """``x + gamma * attn(norm(x), norm(c))`` on the patch tokens (paper, eq. 1)."""

    def __init__(self, dim: int, config: Any) -> None:
        super().__init__()
        attn = _attention(dim, 3, config)
        self.query_norm = nn.LayerNorm(dim, eps=EPS) if attn.reads_query else nn.Identity()
        self.feat_norm = nn.LayerNorm(dim, eps=EPS)
        self.attn = attn
        self.gamma = nn.Parameter(torch.full((dim,), float(config.gamma_init)))

    def forward(self, x: Tensor, c: Tensor, grids: Grids) -> Tensor:
        """x (B, P+N, D), c (B, M, D) -> (B, P+N, D); the P prefix tokens pass by."""
        prefix, patches = x.tensor_split([x.shape[1] - grids.to_prior.shape[0]], dim=1)
        query = self.query_norm(patches.to(self.gamma.dtype))
        injected = self.gamma * self.attn(query, self.feat_norm(c), grids.injection())
        return torch.cat([prefix, (patches + injected).to(x.dtype)], dim=1)


class ConvFFN(nn.Module):
    """FFN with a depthwise 3x3 convolution between its layers, one kernel for the three scales."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, c: Tensor, levels: Sequence[tuple[int, int]]) -> Tensor:
        """(B, M, D) -> (B, M, D)."""
        parts = self.fc1(c).split([h * w for h, w in levels], dim=1)
        parts = [map_to_tokens(self.dwconv(tokens_to_map(p, g))) for p, g in zip(parts, levels)]
        return self.fc2(F.gelu(torch.cat(parts, dim=1)))


class Extractor(nn.Module):
    """``c + attn(norm(c), norm(x))``, then ``c + ffn(norm(c))`` (paper, eq. 2-3)."""

    def __init__(self, dim: int, config: Any) -> None:
        super().__init__()
        attn = _attention(dim, 1, config)
        self.query_norm = nn.LayerNorm(dim, eps=EPS) if attn.reads_query else nn.Identity()
        self.feat_norm = nn.LayerNorm(dim, eps=EPS)
        self.attn = attn
        self.ffn_norm = nn.LayerNorm(dim, eps=EPS) if config.with_cffn else None
        self.ffn = ConvFFN(dim, int(dim * config.cffn_ratio)) if config.with_cffn else None
        self.drop_path = DropPath(config.drop_path)

    def forward(self, c: Tensor, x: Tensor, grids: Grids) -> Tensor:
        """c (B, M, D), patch tokens x (B, N, D) -> (B, M, D)."""
        c = c + self.attn(self.query_norm(c), self.feat_norm(x), grids.extraction())
        if self.ffn is not None and self.ffn_norm is not None:
            c = c + self.drop_path(self.ffn(self.ffn_norm(c), grids.levels))
        return c


class Interaction(nn.Module):
    """One injector, and the extractors that follow its group of blocks."""

    def __init__(self, dim: int, config: Any, extra: int) -> None:
        super().__init__()
        self.injector = Injector(dim, config) if config.injector else None
        self.extractor = Extractor(dim, config)
        self.extra_extractors = nn.ModuleList(Extractor(dim, config) for _ in range(extra))

    def inject(self, x: Tensor, c: Tensor, grids: Grids) -> Tensor:
        """Tokens as the group of blocks gets them."""
        return x if self.injector is None else self.injector(x, c, grids)

    def extract(self, c: Tensor, x: Tensor, grids: Grids) -> Tensor:
        """Multi-scale tokens after the group."""
        for extractor in (self.extractor, *self.extra_extractors):
            c = extractor(c, x, grids)
        return c


class SpatialPrior(nn.Module):
    """A small ResNet-like stem (paper, section 3.2): maps of width D at strides 4, 8, 16 and 32."""

    def __init__(self, dim: int, inplane: int, norm: Norm) -> None:
        super().__init__()

        def conv(cin: int, cout: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(cin, cout, 3, stride, 1, bias=False), norm2d(norm, cout), nn.ReLU(inplace=True)]

        stem = [*conv(3, inplane, 2), *conv(inplane, inplane, 1), *conv(inplane, inplane, 1)]
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, stride=2, padding=1))
        self.conv2 = nn.Sequential(*conv(inplane, 2 * inplane, 2))
        self.conv3 = nn.Sequential(*conv(2 * inplane, 4 * inplane, 2))
        self.conv4 = nn.Sequential(*conv(4 * inplane, 4 * inplane, 2))
        self.fc1 = nn.Conv2d(inplane, dim, 1)
        self.fc2 = nn.Conv2d(2 * inplane, dim, 1)
        self.fc3 = nn.Conv2d(4 * inplane, dim, 1)
        self.fc4 = nn.Conv2d(4 * inplane, dim, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, H, W), sides multiples of 32 -> four maps (B, D, H/s, W/s)."""
        c1 = self.stem(image)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)


@register_adapter("vit-adapter", ViTAdapterConfig)
class ViTAdapter(SideAdapter):
    """ViT-Adapter: a spatial prior and deformable attention beside the blocks, strides 4 to 32."""

    strides = STRIDES

    def __init__(self, spec: Spec, config: ViTAdapterConfig) -> None:
        config = config.resolve(spec)
        super().__init__(spec, config)
        dim, groups = spec.dim, config.interaction_indexes or ()
        self.level_embed = nn.Parameter(torch.zeros(3, dim))
        self.spm = SpatialPrior(dim, config.conv_inplane, config.norm)
        extra = [0] * (len(groups) - 1) + [config.extra_extractors]
        self.interactions = nn.ModuleList(Interaction(dim, config, n) for n in extra)
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (norm2d(config.norm, dim) for _ in STRIDES)
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
        """Image (B, 3, H, W) -> features with maps (B, D, H/s, W/s), s = 4, 8, 16, 32, rounded up."""
        x, blocks = vit.begin(image)
        if self.config.prefix == "drop":
            x = x[:, self._droppable(vit) :]
        c1, *prior = self.spm(pad_to_multiple(image.to(parameter_dtype(self.spm)), STRIDES[-1]))
        levels = [(m.shape[-2], m.shape[-1]) for m in prior]
        grids = Grids.of(vit.grid(image), vit.spec.patch, levels, image)
        c = torch.cat([map_to_tokens(m) + embed for m, embed in zip(prior, self.level_embed)], dim=1)

        taps = []
        for interaction, (first, last) in zip(self.interactions, self.config.interaction_indexes):

            def through_group(
                x: Tensor, c: Tensor, step: Any = interaction, group: Any = blocks[first : last + 1]
            ) -> Tensor:
                x = step.inject(x, c, grids)
                for block in group:
                    x = block(x)
                return x

            x = self._maybe_checkpoint(through_group, x, c)
            tap = self._tap(vit, x, grids)
            c = self._maybe_checkpoint(interaction.extract, c, tap, grids)
            taps.append(tap)
        return vit.finish(x, image, self._pyramid(c1, c, taps, grids, image), trace)

    def _pyramid(self, c1: Tensor, c: Tensor, taps: list[Tensor], grids: Grids, image: Tensor) -> list[Tensor]:
        """Maps at strides 4 to 32: c taken apart, ViT features added, normed, cropped to the image."""
        parts = c.split([h * w for h, w in grids.levels], dim=1)
        c2, c3, c4 = (tokens_to_map(p, g) for p, g in zip(parts, grids.levels))
        maps = [self.up(c2) + c1, c2, c3, c4]
        if self.config.add_vit_feature is not None:
            maps = [m + self._vit_feature(m, taps, k, grids) for k, m in enumerate(maps)]
        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        height, width = image.shape[-2:]
        return [norm(m)[..., : cells(height, s), : cells(width, s)] for norm, m, s in zip(norms, maps, STRIDES)]

    def _vit_feature(self, m: Tensor, taps: list[Tensor], level: int, grids: Grids) -> Tensor:
        """Tokens on the grid of pyramid level 0..3: the last ones, or those of the group at that share of the depth."""
        n = len(taps)
        stage = n - 1 if self.config.add_vit_feature == "last" else cells((level + 1) * n, len(STRIDES)) - 1
        x = tokens_to_map(taps[stage], grids.tokens)
        return resample_map(x, self.spec.patch, STRIDES[level], (m.shape[-2], m.shape[-1]))

    def _tap(self, vit: ViT, x: Tensor, grids: Grids) -> Tensor:
        """Patch tokens as extractors and pyramid read them."""
        x = vit.norm(x) if self.config.tap_norm else x
        return x[:, x.shape[1] - grids.to_prior.shape[0] :].to(self.level_embed.dtype)

    def _maybe_checkpoint(self, run: Any, *args: Any) -> Tensor:
        if self.config.checkpoint and torch.is_grad_enabled():
            return checkpoint(run, *args, use_reentrant=False)
        return run(*args)

    def _droppable(self, vit: ViT) -> int:
        if not vit.prefix_optional:
            raise ValueError(
                f"prefix='drop' needs blocks that run without prefix tokens; those of {vit.spec.family} place their "
                "positions by the prefix. Use prefix='keep'"
            )
        return vit.spec.prefix
