"""What ViT-Adapter is made of: the spatial prior, the injector and the extractor.

Maps are kept channels-last in memory. Tokens (B, h*w, D) and a map (B, D, h, w) are then the same numbers in the same
order, so that going from one to the other costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.adapters._recompute import recompute
from adaptkit.layers import DropPath, Norm, norm2d
from adaptkit.mixers import CrossMixer, Layout, cross_mixer
from adaptkit.ops.grid import cell_centres, map_to_tokens, tokens_to_map

__all__ = ["ConvFFN", "Extractor", "Grids", "Injector", "Interaction", "SpatialPrior"]

STRIDES = (4, 8, 16, 32)
EPS = 1e-6  # of every LayerNorm, as in the official code


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
        self.checkpoint = config.checkpoint

    def forward(self, x: Tensor, c: Tensor, grids: Grids) -> Tensor:
        """x (B, P+N, D), c (B, M, D) -> (B, P+N, D); the P prefix tokens pass by."""

        def attend(patches: Tensor, c: Tensor) -> Tensor:
            query = self.query_norm(patches.to(self.gamma.dtype))
            return self.attn(query, self.feat_norm(c), grids.injection())

        prefix, patches = x.tensor_split([x.shape[1] - grids.to_prior.shape[0]], dim=1)
        injected = self.gamma * recompute(self.checkpoint, attend, patches, c)
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
        self.checkpoint = config.checkpoint

    def forward(self, c: Tensor, x: Tensor, grids: Grids) -> Tensor:
        """c (B, M, D), patch tokens x (B, N, D) -> (B, M, D)."""
        c = c + recompute(self.checkpoint, self._attend, c, x, grids)
        return c if self.ffn is None else self.drop_path.add(c, recompute(self.checkpoint, self._feed, c, grids))

    def _attend(self, c: Tensor, x: Tensor, grids: Grids) -> Tensor:
        return self.attn(self.query_norm(c), self.feat_norm(x), grids.extraction())

    def _feed(self, c: Tensor, grids: Grids) -> Tensor:
        return self.ffn(self.ffn_norm(c), grids.levels)  # type: ignore[misc]


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
    """A small ResNet-like stem (paper, section 3.2): maps of width D at strides 4, 8, 16 and 32, channels-last."""

    def __init__(self, dim: int, inplane: int, norm: Norm, finest: bool = True) -> None:
        """``finest=False`` leaves out the map at stride 4."""
        super().__init__()

        def conv(cin: int, cout: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(cin, cout, 3, stride, 1, bias=False), norm2d(norm, cout), nn.ReLU(inplace=True)]

        *stem, relu = [*conv(3, inplane, 2), *conv(inplane, inplane, 1), *conv(inplane, inplane, 1)]
        # The largest of what is positive is what is positive of the largest, on a quarter of the pixels.
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, stride=2, padding=1), relu)
        self.conv2 = nn.Sequential(*conv(inplane, 2 * inplane, 2))
        self.conv3 = nn.Sequential(*conv(2 * inplane, 4 * inplane, 2))
        self.conv4 = nn.Sequential(*conv(4 * inplane, 4 * inplane, 2))
        self.fc1 = nn.Conv2d(inplane, dim, 1) if finest else None
        self.fc2 = nn.Conv2d(2 * inplane, dim, 1)
        self.fc3 = nn.Conv2d(4 * inplane, dim, 1)
        self.fc4 = nn.Conv2d(4 * inplane, dim, 1)

    def forward(self, image: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """(B, 3, H, W), sides multiples of 32 -> four maps (B, D, H/s, W/s), the first one if it is made."""
        c1 = self.stem(image.contiguous(memory_format=torch.channels_last))
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return None if self.fc1 is None else self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)
