"""ViT-Adapter with the data flow of the authors' code, written plainly: what `step.py` compares with.

The same equations and tensor names as the paper's release: maps flattened to tokens and back by copies, the three
scales concatenated and split at each step, sampling by the ``grid_sample`` core, one autograd graph over everything.
The backbone is a timm ViT, frozen, with its fused attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.core.layers import DropPath

from .ops import core

Shapes = list[tuple[int, int]]


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention around a sampling core."""

    def __init__(self, dim: int, levels: int, heads: int, ratio: float) -> None:
        super().__init__()
        width = int(dim * ratio)
        self.levels, self.heads = levels, heads
        self.sampling_offsets = nn.Linear(dim, heads * levels * 4 * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * 4)
        self.value_proj = nn.Linear(dim, width)
        self.output_proj = nn.Linear(width, dim)
        self.core = core()

    def forward(self, query: Tensor, reference: Tensor, feat: Tensor, shapes: Shapes) -> Tensor:
        """Query (B, Q, D) with points (1, Q, 1, 2), feat (B, S, D) -> (B, Q, D)."""
        n, q, _ = query.shape
        value = self.value_proj(feat).view(n, feat.shape[1], self.heads, -1)
        offsets = self.sampling_offsets(query).view(n, q, self.heads, self.levels, 4, 2)
        weights = self.attention_weights(query).view(n, q, self.heads, self.levels * 4)
        weights = F.softmax(weights, -1).view(n, q, self.heads, self.levels, 4)
        normalizer = torch.tensor([[w, h] for h, w in shapes], dtype=query.dtype, device=query.device)
        locations = reference[:, :, None, :, None, :] + offsets / normalizer[None, None, None, :, None, :]
        return self.output_proj(self.core(value, shapes, locations, weights))


class Injector(nn.Module):
    """Tokens of the ViT read the pyramid."""

    def __init__(self, dim: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.query_norm, self.feat_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = MSDeformAttn(dim, 3, heads, ratio)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, reference: Tensor, c: Tensor, shapes: Shapes) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return x + self.gamma * self.attn(self.query_norm(x), reference, self.feat_norm(c), shapes)


class DWConv(nn.Module):
    """Depthwise 3x3 on the three scales of one token sequence."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, 21n, D), the middle scale being h x w = 4n -> the same."""
        b, tokens, d = x.shape
        n = tokens // 21
        x1 = x[:, : 16 * n].transpose(1, 2).reshape(b, d, 2 * h, 2 * w).contiguous()
        x2 = x[:, 16 * n : 20 * n].transpose(1, 2).reshape(b, d, h, w).contiguous()
        x3 = x[:, 20 * n :].transpose(1, 2).reshape(b, d, h // 2, w // 2).contiguous()
        return torch.cat([self.dwconv(y).flatten(2).transpose(1, 2) for y in (x1, x2, x3)], dim=1)


class ConvFFN(nn.Module):
    """Linear, depthwise convolution, GELU, linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.dwconv, self.fc2 = nn.Linear(dim, dim // 4), DWConv(dim // 4), nn.Linear(dim // 4, dim)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, M, D) -> (B, M, D)."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), h, w)))


class Extractor(nn.Module):
    """The pyramid reads the tokens of the ViT."""

    def __init__(self, dim: int, heads: int, ratio: float, drop_path: float) -> None:
        super().__init__()
        self.query_norm, self.feat_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = MSDeformAttn(dim, 1, heads, ratio)
        self.ffn, self.ffn_norm, self.drop_path = ConvFFN(dim), nn.LayerNorm(dim, eps=1e-6), DropPath(drop_path)

    def forward(self, c: Tensor, reference: Tensor, x: Tensor, shapes: Shapes, h: int, w: int) -> Tensor:
        """(B, M, D) -> (B, M, D)."""
        c = c + self.attn(self.query_norm(c), reference, self.feat_norm(x), shapes)
        return c + self.drop_path(self.ffn(self.ffn_norm(c), h, w))


class InteractionBlock(nn.Module):
    """Injector, a group of blocks, extractors."""

    def __init__(self, dim: int, heads: int, ratio: float, drop_path: float, extra: bool) -> None:
        super().__init__()
        self.injector = Injector(dim, heads, ratio)
        self.extractor = Extractor(dim, heads, ratio, drop_path)
        count = 2 if extra else 0
        self.extra_extractors = nn.ModuleList(Extractor(dim, heads, ratio, drop_path) for _ in range(count))

    def forward(self, x: Tensor, cls: Tensor, c: Tensor, blocks: Any, inputs1: Any, inputs2: Any, h: int, w: int):
        """Tokens, class token and pyramid after the group."""
        x = self.injector(x, inputs1[0], c, inputs1[1])
        x = torch.cat([cls, x], dim=1)
        for block in blocks:
            x = block(x)
        cls, x = x[:, :1], x[:, 1:]
        for extractor in (self.extractor, *self.extra_extractors):
            c = extractor(c, inputs2[0], x, inputs2[1], h, w)
        return x, cls, c


class SpatialPriorModule(nn.Module):
    """A convolutional stem; strides 8, 16 and 32 leave it as tokens."""

    def __init__(self, dim: int, inplanes: int = 64) -> None:
        super().__init__()

        def conv(cin: int, cout: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]

        stem = [*conv(3, inplanes, 2), *conv(inplanes, inplanes, 1), *conv(inplanes, inplanes, 1)]
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1))
        self.conv2 = nn.Sequential(*conv(inplanes, 2 * inplanes, 2))
        self.conv3 = nn.Sequential(*conv(2 * inplanes, 4 * inplanes, 2))
        self.conv4 = nn.Sequential(*conv(4 * inplanes, 4 * inplanes, 2))
        self.fc1, self.fc2 = nn.Conv2d(inplanes, dim, 1), nn.Conv2d(2 * inplanes, dim, 1)
        self.fc3, self.fc4 = nn.Conv2d(4 * inplanes, dim, 1), nn.Conv2d(4 * inplanes, dim, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image -> a map at stride 4, tokens at 8, 16 and 32."""
        c1 = self.stem(x)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        c1, c2, c3, c4 = self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)
        return c1, *(c.flatten(2).transpose(1, 2).contiguous() for c in (c2, c3, c4))


class OfficialFlow(nn.Module):
    """The authors' ViT-Adapter for segmentation (tokens of each stage are added to the pyramid), on a frozen timm ViT.

    Its sides must be multiples of 32 and its patch 16, as theirs.
    """

    def __init__(self, vit: Any, heads: int, ratio: float, drop_path: float) -> None:
        super().__init__()
        dim, depth = vit.embed_dim, len(vit.blocks)
        self.vit = vit.requires_grad_(False)
        self.groups = [(i * depth // 4, (i + 1) * depth // 4) for i in range(4)]
        self.level_embed = nn.Parameter(torch.randn(3, dim))
        self.spm = SpatialPriorModule(dim)
        self.interactions = nn.ModuleList(InteractionBlock(dim, heads, ratio, drop_path, i == 3) for i in range(4))
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.BatchNorm2d(dim) for _ in range(4))

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> maps (B, D, H/s, W/s), s = 4, 8, 16, 32."""
        h, w = image.shape[2] // 16, image.shape[3] // 16
        inputs1 = reference_points([(h, w)], image.device), [(2 * h, 2 * w), (h, w), (h // 2, w // 2)]
        inputs2 = reference_points([(2 * h, 2 * w), (h, w), (h // 2, w // 2)], image.device), [(h, w)]
        c1, c2, c3, c4 = self.spm(image)
        n2, n3 = c2.shape[1], c3.shape[1]
        c = torch.cat([c2 + self.level_embed[0], c3 + self.level_embed[1], c4 + self.level_embed[2]], dim=1)
        x = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(image)))
        cls, x = x[:, :1], x[:, 1:]
        b, _, d = x.shape
        outs = []
        for layer, (first, last) in zip(self.interactions, self.groups):
            x, cls, c = layer(x, cls, c, self.vit.blocks[first:last], inputs1, inputs2, h, w)
            outs.append(x.transpose(1, 2).reshape(b, d, h, w).contiguous())
        c2, c3, c4 = c[:, :n2], c[:, n2 : n2 + n3], c[:, n2 + n3 :]
        c2 = c2.transpose(1, 2).reshape(b, d, 2 * h, 2 * w).contiguous()
        c3 = c3.transpose(1, 2).reshape(b, d, h, w).contiguous()
        c4 = c4.transpose(1, 2).reshape(b, d, h // 2, w // 2).contiguous()
        c1 = self.up(c2) + c1
        x1, x2, x3, x4 = outs
        c1 = c1 + F.interpolate(x1, scale_factor=4, mode="bilinear", align_corners=False)
        c2 = c2 + F.interpolate(x2, scale_factor=2, mode="bilinear", align_corners=False)
        c3 = c3 + x3
        c4 = c4 + F.interpolate(x4, scale_factor=0.5, mode="bilinear", align_corners=False)
        return [self.norm1(c1), self.norm2(c2), self.norm3(c3), self.norm4(c4)]


def reference_points(shapes: Shapes, device: torch.device) -> Tensor:
    """(1, Q, 1, 2) centres of the cells of several grids, as (x, y) in [0, 1]."""
    points = []
    for h, w in shapes:
        y, x = torch.meshgrid(
            torch.linspace(0.5, h - 0.5, h, device=device) / h,
            torch.linspace(0.5, w - 0.5, w, device=device) / w,
            indexing="ij",
        )
        points.append(torch.stack([x.reshape(-1), y.reshape(-1)], -1))
    return torch.cat(points)[None, :, None]
