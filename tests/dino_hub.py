"""Tiny vision transformers with the attribute names of the original DINOv2 and DINOv3 classes, written for the tests."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Patches(nn.Module):
    def __init__(self, side: int, patch: int, dim: int, flat: bool) -> None:
        super().__init__()
        self.img_size, self.patch_size, self.flat = (side, side), (patch, patch), flat
        self.proj, self.norm = nn.Conv2d(3, dim, patch, patch), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2) if self.flat else x.permute(0, 2, 3, 1)


class Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Gated(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, attn_bias: Any = None, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if rope is not None:
            sin, cos = rope
            still = q.shape[2] - len(sin)
            q, k = (torch.cat([t[:, :, :still], t[:, :, still:] * cos + rotate_half(t[:, :, still:]) * sin], dim=2)
                    for t in (q, k))  # fmt: skip
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, ffn: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = (
            nn.LayerNorm(dim), Attention(dim, heads), Scale(dim), nn.Identity()
        )  # fmt: skip
        self.norm2, self.mlp, self.ls2, self.drop_path2 = nn.LayerNorm(dim), ffn(dim), Scale(dim), nn.Identity()

    def forward(self, x: Any, rope: Any = None) -> Any:
        """Tokens, or a list of them with a list of angles, as DINOv3 runs crops of several sizes."""
        if isinstance(x, list):
            return [self.forward(*pair) for pair in zip(x, rope)]
        x = x + self.ls1(self.attn(self.norm1(x), rope=rope))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Chunk(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class DinoV2(nn.Module):
    """Class token, registers, patches; positions are resampled at another size."""

    def __init__(self, side: int, patch: int, dim: int, depth: int, heads: int, registers: int = 0, chunks: int = 0,
                 ffn: type[nn.Module] = Mlp, classes: int = 0) -> None:  # fmt: skip
        super().__init__()
        self.patch_embed = Patches(side, patch, dim, True)
        self.cls_token, self.mask_token = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.zeros(1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (side // patch) ** 2, dim))
        self.register_tokens = nn.Parameter(torch.randn(1, registers, dim)) if registers else None
        self.interpolate_antialias, self.interpolate_offset = registers > 0, 0.0
        blocks = [Block(dim, heads, ffn) for _ in range(depth)]
        self.chunked_blocks = chunks > 0
        if chunks:
            size = depth // chunks
            blocks = [Chunk([nn.Identity()] * (i * size) + blocks[i * size : (i + 1) * size]) for i in range(chunks)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes) if classes else nn.Identity()

    def interpolate_pos_encoding(self, grid: tuple[int, int]) -> Tensor:
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if grid == (side, side):
            return self.pos_embed
        square = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        square = F.interpolate(square, size=grid, mode="bicubic", antialias=self.interpolate_antialias)
        return torch.cat([self.pos_embed[:, :1], square.flatten(2).transpose(1, 2)], dim=1)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Any = None) -> Tensor:
        grid = (x.shape[2] // self.patch_embed.patch_size[0], x.shape[3] // self.patch_embed.patch_size[1])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)
        x = x + self.interpolate_pos_encoding(grid)
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        return x

    def forward_features(self, x: Tensor, masks: Any = None) -> dict[str, Any]:
        x = self.prepare_tokens_with_masks(x, masks)
        for block in self.blocks:
            x = block(x)
        normed, registers = self.norm(x), 0 if self.register_tokens is None else self.register_tokens.shape[1]
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1 : 1 + registers],
            "x_norm_patchtokens": normed[:, 1 + registers :],
            "x_prenorm": x,
            "masks": masks,
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x)["x_norm_clstoken"])


class Rope(nn.Module):
    """Sines and cosines (h*w, E) of the centres of patches at -1..1."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("periods", 100 ** (torch.arange(head_dim // 4) / (head_dim // 4)))

    def forward(self, *, H: int, W: int) -> tuple[Tensor, Tensor]:
        ys, xs = (2 * (torch.arange(n) + 0.5) / n - 1 for n in (H, W))
        places = torch.stack(torch.meshgrid(ys, xs, indexing="ij"), dim=-1).flatten(0, 1)
        angles = (2 * math.pi * places[:, :, None] / self.periods).flatten(1).tile(2)
        return angles.sin(), angles.cos()


class DinoV3(nn.Module):
    """Class token, storage tokens, patches; rotary positions."""

    def __init__(self, side: int, patch: int, dim: int, depth: int, heads: int, storage: int = 2,
                 untied: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.patch_embed = Patches(side, patch, dim, False)
        self.cls_token, self.mask_token = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.zeros(1, dim))
        self.n_storage_tokens = storage
        self.storage_tokens = nn.Parameter(torch.randn(1, storage, dim)) if storage else None
        self.rope_embed = Rope(dim // heads)
        self.blocks = nn.ModuleList(Block(dim, heads, Gated) for _ in range(depth))
        self.norm, self.untie_cls_and_patch_norms = nn.LayerNorm(dim), untied
        self.cls_norm = nn.LayerNorm(dim) if untied else None
        self.head = nn.Identity()

    def prepare_tokens_with_masks(self, x: Tensor, masks: Any = None) -> tuple[Tensor, tuple[int, int]]:
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.storage_tokens) if t is not None]
        return torch.cat([*prefix, x.flatten(1, 2)], dim=1), grid

    def forward_features(self, x: Tensor, masks: Any = None) -> dict[str, Any]:
        x, (height, width) = self.prepare_tokens_with_masks(x, masks)
        crops = [x]
        for block in self.blocks:
            crops = block(crops, [self.rope_embed(H=height, W=width)])
        x = crops[0]
        prefix = 1 + self.n_storage_tokens
        first = (self.cls_norm if self.untie_cls_and_patch_norms else self.norm)(x[:, :prefix])
        return {
            "x_norm_clstoken": first[:, 0],
            "x_storage_tokens": first[:, 1:],
            "x_norm_patchtokens": self.norm(x[:, prefix:]),
            "x_prenorm": x,
            "masks": masks,
        }

    def forward(self, x: Tensor, is_training: bool = False) -> Any:
        said = self.forward_features(x)
        return said if is_training else self.head(said["x_norm_clstoken"])
