"""What PMT's decoder is made of: transformer blocks with two-dimensional rotary angles for patches, and scalers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.core.layers import LayerNorm2d

__all__ = ["Block", "Grid", "ScaleBlock", "Scalers", "Table", "projection", "rotary_table"]

Grid = tuple[int, int]
Table = tuple[Tensor, Tensor]  #: cos and sin (N, E) of the patches' angles


def rotary_table(grid: Grid, width: int, like: Tensor) -> Table:
    """Angles of a grid (h, w): cos and sin (N, width), of ``2 pi (y, x) * 100^(-4j / width)``, j < width / 4.

    y and x are the centres of the patches, from -1 to 1 over the grid. In training too: the authors stretch the places
    by a random factor there where they compute the table themselves (DINOv2), not where it is a frozen DINOv3's.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequency = 100.0 ** (-4.0 * torch.arange(width // 4, device=like.device, dtype=dtype) / width)
    y, x = (2.0 * (torch.arange(n, device=like.device, dtype=dtype) + 0.5) / n - 1.0 for n in grid)
    place = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2)
    angle = (2.0 * math.pi * place[..., None] * frequency).flatten(1).tile(2)  # (N, width)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotated(x: Tensor, table: Table) -> Tensor:
    """Turn the last N of the tokens x (B, heads, S, E) by their angles: channel j with j + E/2."""
    cos, sin = table
    before, patches = x.tensor_split([x.shape[2] - cos.shape[0]], dim=2)
    a, b = patches.chunk(2, dim=-1)
    return torch.cat([before, patches * cos + torch.cat([-b, a], dim=-1) * sin], dim=2)


class Attention(nn.Module):
    """Softmax attention; keys have no bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=name != "k") for name in "qkv")
        self.o_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, table: Table, visible: Tensor | None = None) -> Tensor:
        """x (B, S, D) -> (B, S, D); ``visible`` (B, Q, N) bool: the patches that each of the first Q tokens reads."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q, table), rotated(k, table)
        if visible is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            free = visible.new_ones(1, 1, 1).expand(*visible.shape[:2], x.shape[1] - visible.shape[2])
            mask = torch.cat([free, visible], dim=2)[:, None]  # (B, 1, Q, S)
            held, others = q.tensor_split([visible.shape[1]], dim=2)
            read = [
                F.scaled_dot_product_attention(held, k, v, attn_mask=mask),
                F.scaled_dot_product_attention(others, k, v),
            ]
            out = torch.cat(read, dim=2)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.down_proj(F.gelu(self.up_proj(x)))


class LayerScale(nn.Module):
    """A factor for each channel, 1 at the start."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return x * self.lambda1


class Block(nn.Module):
    """``x + s attn(LN(x))``, then ``x + t mlp(LN(x))``."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.layer_scale1 = nn.LayerNorm(dim), Attention(dim, heads), LayerScale(dim)
        self.norm2, self.mlp, self.layer_scale2 = nn.LayerNorm(dim), MLP(dim, hidden), LayerScale(dim)

    def forward(self, x: Tensor, table: Table, visible: Tensor | None = None) -> Tensor:
        """(B, S, D) -> (B, S, D); see :class:`Attention`."""
        x = x + self.layer_scale1(self.attention(self.norm1(x), table, visible))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class ScaleBlock(nn.Module):
    """Twice as fine: transposed convolution, GELU, depthwise convolution, LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm = LayerNorm2d(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, 2h, 2w)."""
        return self.norm(self.conv2(F.gelu(self.conv1(x))))


class Scalers(nn.Module):
    """``sum_l a_l * y_l``, a factor for each channel of each level, 1 at the start."""

    def __init__(self, dim: int, levels: int) -> None:
        super().__init__()
        for i in range(levels):
            self.register_parameter(str(i), nn.Parameter(torch.ones(dim)))

    def forward(self, *levels: Tensor) -> Tensor:
        """(B, S, D) of each level -> (B, S, D)."""
        first, *others = (y * scale for y, scale in zip(levels, self.parameters()))
        for term in others:
            first = first + term
        return first


def projection(kind: str, dim: int) -> nn.Module:
    """What a level goes through."""
    if kind == "mlp":
        return nn.Sequential(nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim))
    return nn.Linear(dim, dim) if kind == "linear" else nn.Identity()
