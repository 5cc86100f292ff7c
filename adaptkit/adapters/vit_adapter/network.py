r"""ViT-Adapter (Chen et al., ICLR 2023): a spatial prior beside a plain ViT, exchanged by deformable attention.

With tokens x of the ViT and multi-scale tokens c of the spatial prior, interaction i says (section 3.3, eq. 1-3)::

    x = x + gamma_i * attn(norm(x), norm(c))                  injector, gamma_i = 0 at the start
    x = block(x)                                              for the frozen blocks of group i
    c = c + attn(norm(c), norm(x));  c = c + ffn(norm(c))     extractor

Without injectors and extractors each level is the sum of the prior and the ViT's tokens, the first rows of table 6. The
attention is multi-scale deformable; any other mixer of ``adaptkit.mixers`` can replace it, as in table 7. The pyramid
has strides 4, 8, 16 and 32. The image is padded at the right and the bottom, to a multiple of the patch for the ViT and
of 32 for the prior. The two grids may then cover different extents, so a reference point is a position in pixels
divided by the extent, in pixels, of the grid that is sampled.

Maps are channels-last, so that a map (B, D, h, w) and its tokens (B, h*w, D) have the same layout in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.adapters.base import Aux, SideAdapter
from adaptkit.adapters.vit_adapter.config import STRIDES, ViTAdapterConfig
from adaptkit.core.block import Fn
from adaptkit.core.checkpointing import recompute
from adaptkit.core.layers import DropPath, Norm, init_weights, norm2d, parameter_dtype
from adaptkit.core.registry import register_adapter
from adaptkit.core.view import Features, Spec, ViT
from adaptkit.mixers import CrossMixer, Layout, cross_mixer
from adaptkit.mixers.msda import MSDeformAttn
from adaptkit.ops.grid import (
    cell_centres,
    cells,
    map_to_tokens,
    pad_to_multiple,
    pair,
    pairs,
    resample_map,
    tokens_to_map,
)
from adaptkit.seam import accelerated, modes

__all__ = ["ConvFFN", "Extractor", "Grids", "Injector", "Interaction", "SpatialPrior", "ViTAdapter", "finest_map"]

EPS = 1e-6  # of every LayerNorm, as in the official code

Grid = tuple[int, int]


class Grids(NamedTuple):
    """Where the tokens of x and of c lie in one image, in cells, and as each sees the other."""

    tokens: Grid  #: (h, w) of x
    levels: tuple[Grid, ...]  #: (h, w) of the three parts of c, strides 8, 16, 32
    injection: Layout  #: tokens of x read the levels of c
    extraction: Layout  #: tokens of c read the map of x

    @staticmethod
    def of(tokens: Grid, patch: int, levels: Sequence[Grid], image: Tensor) -> Grids:
        """Lay out both grids for a token grid, its patch and the levels of the prior."""
        dtype = torch.promote_types(image.dtype, torch.float32)  # bf16 cannot tell neighbouring pixels apart
        x = cell_centres(tokens, patch, image.device, dtype)  # (N, 2)
        c = torch.cat([cell_centres(g, s, image.device, dtype) for g, s in zip(levels, STRIDES[1:])])  # (M, 2)
        extent_x = pair(tokens[1] * patch, tokens[0] * patch, x)  # width and height in pixels
        extent_c = pair(levels[0][1] * STRIDES[1], levels[0][0] * STRIDES[1], x)
        sizes = pairs([(w, h) for h, w in (*levels, tokens)], x)  # (4, 2)
        injection = Layout((tokens,), tuple(levels), x / extent_c, sizes[:-1])
        return Grids(tokens, tuple(levels), injection, Layout(tuple(levels), (tokens,), c / extent_x, sizes[-1:]))


class SpatialPrior(nn.Module):
    """Spatial prior module (section 3.2): a convolutional stem, then one stride-2 convolution per level."""

    def __init__(self, dim: int, inplane: int, norm: Norm, finest: bool = True, channels: int = 3) -> None:
        """``finest=False`` leaves out ``fc1``, which projects the map at stride 4; ``channels`` are the image's."""
        super().__init__()

        def conv(cin: int, cout: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(cin, cout, 3, stride, 1, bias=False), norm2d(norm, cout), nn.ReLU()]

        stem = [*conv(channels, inplane, 2), *conv(inplane, inplane, 1), *conv(inplane, inplane, 1)]
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, stride=2, padding=1))
        self.conv2 = nn.Sequential(*conv(inplane, 2 * inplane, 2))
        self.conv3 = nn.Sequential(*conv(2 * inplane, 4 * inplane, 2))
        self.conv4 = nn.Sequential(*conv(4 * inplane, 4 * inplane, 2))
        self.fc1 = nn.Conv2d(inplane, dim, 1) if finest else None
        self.fc2 = nn.Conv2d(2 * inplane, dim, 1)
        self.fc3 = nn.Conv2d(4 * inplane, dim, 1)
        self.fc4 = nn.Conv2d(4 * inplane, dim, 1)

    @accelerated
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Image (B, C, H, W), sides multiples of 32 -> c1 (B, inplane, H/4, W/4), and three maps of width D.

        ``fc1`` projects c1 where it is needed, at the end: that map is larger than all others together.
        """
        c1 = self.stem(image.contiguous(memory_format=torch.channels_last))
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return c1, self.fc2(c2), self.fc3(c3), self.fc4(c4)


def attention(dim: int, levels: int, config: Any) -> CrossMixer:
    """Build the attention between the two grids; queries read so many levels."""
    heads, points, ratio = config.deform_num_heads, config.n_points, config.deform_ratio
    return cross_mixer(config.attention, dim, levels=levels, heads=heads, points=points, ratio=ratio)


class Injector(nn.Module):
    """``x + gamma * attn(norm(x), norm(c))`` (eq. 1)."""

    def __init__(self, dim: int, config: ViTAdapterConfig) -> None:
        super().__init__()
        attn = attention(dim, 3, config)
        self.query_norm = nn.LayerNorm(dim, eps=EPS) if attn.reads_query else nn.Identity()
        self.feat_norm = nn.LayerNorm(dim, eps=EPS)
        self.attn = attn
        self.gamma = nn.Parameter(torch.full((dim,), float(config.gamma_init)))

    @accelerated
    def forward(self, x: Tensor, c: Tensor, grids: Grids) -> Tensor:
        """x (B, P+N, D), c (B, M, D) -> (B, P+N, D); the P prefix tokens pass by."""
        prefix, patches = x.tensor_split([x.shape[1] - grids.tokens[0] * grids.tokens[1]], dim=1)
        patches = patches.to(self.gamma.dtype)
        read = self.attn(self.query_norm(patches), self.feat_norm(c), grids.injection)
        return torch.cat([prefix, (patches + self.gamma * read).to(x.dtype)], dim=1)


class ConvFFN(nn.Module):
    """FFN with a depthwise 3x3 convolution between its layers, one kernel for the three scales."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, c: Tensor, levels: Sequence[Grid]) -> Tensor:
        """(B, M, D), the levels one after another -> (B, M, D)."""
        parts = self.fc1(c).split([h * w for h, w in levels], dim=1)
        mixed = [map_to_tokens(self.dwconv(tokens_to_map(p, g))) for p, g in zip(parts, levels)]
        return self.fc2(F.gelu(torch.cat(mixed, dim=1)))


class Extractor(nn.Module):
    """``c + attn(norm(c), norm(x))``, then ``c + ffn(norm(c))`` (eq. 2-3)."""

    def __init__(self, dim: int, config: ViTAdapterConfig) -> None:
        super().__init__()
        attn = attention(dim, 1, config)
        self.query_norm = nn.LayerNorm(dim, eps=EPS) if attn.reads_query else nn.Identity()
        self.feat_norm = nn.LayerNorm(dim, eps=EPS)
        self.attn = attn
        self.ffn_norm = nn.LayerNorm(dim, eps=EPS) if config.with_cffn else None
        self.ffn = ConvFFN(dim, int(dim * config.cffn_ratio)) if config.with_cffn else None
        self.drop_path = DropPath(config.drop_path or 0.0)

    @accelerated
    def forward(self, c: Tensor, x: Tensor, grids: Grids) -> Tensor:
        """c (B, M, D), patch tokens x (B, N, D) -> (B, M, D)."""
        c = c + self.attn(self.query_norm(c), self.feat_norm(x), grids.extraction)
        if self.ffn is None or self.ffn_norm is None:
            return c
        return c + self.drop_path(self.ffn(self.ffn_norm(c), grids.levels))


class Interaction(nn.Module):
    """An injector, the frozen blocks of its group, and the extractors behind them (figure 3)."""

    def __init__(self, dim: int, config: ViTAdapterConfig, extra: int) -> None:
        super().__init__()
        self.injector = Injector(dim, config) if config.injector else None
        self.extractor = Extractor(dim, config) if config.extractor else None
        self.extra_extractors = nn.ModuleList(Extractor(dim, config) for _ in range(extra if config.extractor else 0))

    def forward(
        self, x: Tensor, c: Tensor, blocks: Sequence[Fn], read: Fn, grids: Grids, run: Callable[..., Tensor]
    ) -> tuple[Tensor, ...]:
        """x (B, P+N, D), c (B, M, D) -> x, c, and the patch tokens (B, N, D) that ``read`` took from x.

        ``run(part, *args)`` calls a part; with activation checkpointing it recomputes the part in the backward pass.
        """
        if self.injector is not None:
            x = run(self.injector, x, c, grids)
        for block in blocks:
            x = run(block, x)
        tokens = read(x)
        if self.extractor is not None:
            for extractor in (self.extractor, *self.extra_extractors):
                c = run(extractor, c, tokens, grids)
        return x, c, tokens


@accelerated
def finest_map(
    fc1: nn.Module, up: nn.Module, norm: nn.Module, c1: Tensor, c2: Tensor, x: Tensor | None, patch: int
) -> Tensor:
    """Return the map at stride 4, ``norm(fc1(c1) + up(c2) + x)``.

    c1 (B, inplane, H, W), c2 (B, D, H/2, W/2), tokens x (B, D, h, w) at stride ``patch`` or None -> (B, D, H, W).
    """
    finest = fc1(c1) + up(c2)
    return norm(finest if x is None else finest + resample_map(x, patch, STRIDES[0], finest.shape[-2:]))


@register_adapter("vit-adapter", ViTAdapterConfig)
class ViTAdapter(SideAdapter):
    """ViT-Adapter: a spatial prior and deformable attention beside the blocks, strides 4 to 32."""

    strides: tuple[int, ...] = STRIDES

    def __init__(self, spec: Spec, config: ViTAdapterConfig) -> None:
        config = config.resolve(spec)
        super().__init__(spec, config)
        dim, groups = spec.embed_dim, config.interaction_indexes or ()
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

    def forward(self, vit: ViT, image: Tensor, aux: Aux) -> Features:
        """Image (B, C, H, W) -> features with maps (B, D, H/s, W/s), s of ``strides``, rounded up."""
        x, blocks = vit.begin(image)
        if self.config.prefix == "drop":
            x = x[:, self._num_dropped(vit) :]
        c1, *prior = self.spm(pad_to_multiple(image.to(parameter_dtype(self.spm)), STRIDES[-1]))
        grids = Grids.of(vit.grid(image), vit.spec.patch_size, [(m.shape[-2], m.shape[-1]) for m in prior], image)
        c = torch.cat([map_to_tokens(m) + e for m, e in zip(prior, self.level_embed)], dim=1)  # (B, M, D)

        read, run, taps = partial(self._read, vit, grids), partial(recompute, self._state(vit)), []
        for interaction, (first, last) in zip(self.interactions, self.config.interaction_indexes):
            x, c, tokens = interaction(x, c, blocks[first : last + 1], read, grids, run)
            taps.append(tokens)
        return vit.finish(x, image, self._pyramid(c1, c, taps, grids, image), aux)

    def _state(self, vit: ViT) -> list[tuple[object, str]] | None:
        """Return the state that recomputation restores, see :func:`adaptkit.seam.bound`; None: recompute nothing."""
        return [*vit.state(), *modes(self.modules())] if self.config.checkpoint else None

    def _read(self, vit: ViT, grids: Grids, x: Tensor) -> Tensor:
        """Tokens (B, P+N, D) -> patch tokens (B, N, D), as extractors and pyramid read them."""
        x = vit.norm(x) if self.config.tap_norm else x
        return x[:, x.shape[1] - grids.tokens[0] * grids.tokens[1] :].to(self.level_embed.dtype)

    def _pyramid(self, c1: Tensor, c: Tensor, taps: Sequence[Tensor], grids: Grids, image: Tensor) -> list[Tensor]:
        """Take c (B, M, D) apart, add the ViT's features, norm, and crop to the image: a map for each stride."""
        parts = c.split([h * w for h, w in grids.levels], dim=1)
        levels = [tokens_to_map(p, g) for p, g in zip(parts, grids.levels)]
        maps = []
        for i, (stride, norm) in enumerate(zip(STRIDES, (self.norm1, self.norm2, self.norm3, self.norm4))):
            if stride not in self.strides:
                continue
            x = self._vit_feature(i, taps, grids)
            if self.up is not None and self.spm.fc1 is not None and i == 0:
                m = finest_map(self.spm.fc1, self.up, norm, c1, levels[0], x, self.spec.patch_size)
            else:
                m, size = levels[i - 1], grids.levels[i - 1]
                m = norm(m if x is None else m + resample_map(x, self.spec.patch_size, stride, size))
            maps.append(m[..., : cells(image.shape[-2], stride), : cells(image.shape[-1], stride)])
        return maps

    def _vit_feature(self, level: int, taps: Sequence[Tensor], grids: Grids) -> Tensor | None:
        """Return the ViT's tokens as a map (B, D, h, w), to add to a level.

        ``"last"``: those after the last group; ``"per-stage"``: those after the group at (level + 1) / 4 of the depth.
        """
        if self.config.add_vit_feature is None:
            return None
        per_stage = cells((level + 1) * len(taps), len(STRIDES)) - 1
        return tokens_to_map(taps[-1 if self.config.add_vit_feature == "last" else per_stage], grids.tokens)

    def _num_dropped(self, vit: ViT) -> int:
        """Return how many prefix tokens ``prefix="drop"`` removes; ``ValueError`` where the blocks need them."""
        if not vit.prefix_optional:
            raise ValueError(
                f"prefix='drop' needs blocks that run without prefix tokens; those of {vit.spec.family} count patch "
                "positions from the end of the prefix. Use prefix='keep'"
            )
        return vit.spec.num_prefix_tokens
