"""Multi-scale deformable attention as a mixer: each query reads a few points that it places itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from adaptkit.core.layers import check_positive
from adaptkit.mixers.base import CrossMixer, Layout, Mixer, even_heads
from adaptkit.ops import ms_deform_attn
from adaptkit.ops.grid import cell_centres, map_to_tokens, pair, tokens_to_map
from adaptkit.seam import accelerated

__all__ = ["MSDeformAttn", "MSDeformMixer"]


class MSDeformAttn(CrossMixer):
    """Multi-scale deformable attention (Deformable DETR, Zhu et al. 2021, eq. 3).

    Args:
        dim: width D of queries and maps.
        levels: number of maps L.
        heads: attention heads; they divide ``int(dim * ratio)``.
        points: sampling points K per head and level.
        ratio: width of the values over D; the paper has 1.

    Call :meth:`reset_parameters` after any general initialisation of the module around it, which would overwrite it.
    """

    def __init__(self, dim: int, levels: int, heads: int, points: int, ratio: float) -> None:
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        width = int(dim * ratio)
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} do not divide the {width} channels of the values; choose a divisor")
        check_positive(self, "points")
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, width)
        self.output_proj = nn.Linear(width, dim)

    def reset_parameters(self) -> None:
        """Point k of head m starts k cells away in direction 2*pi*m/heads; all weigh the same."""
        theta = torch.arange(self.heads) * (2 * math.pi / self.heads)
        star = torch.stack([theta.cos(), theta.sin()], -1)
        star = star / star.abs().amax(-1, keepdim=True)  # on the unit square
        steps = torch.arange(1, self.points + 1).view(1, 1, -1, 1)
        offsets = star.view(self.heads, 1, 1, 2) * steps.expand(-1, self.levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.weight.zero_()
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for proj in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(proj.weight)
            nn.init.zeros_(proj.bias)

    @accelerated
    def forward(self, query: Tensor, feat: Tensor, layout: Layout) -> Tensor:
        """Query (B, Q, D), feat (B, S, D) -> (B, Q, D)."""
        value = self.value_proj(feat).unflatten(2, (self.heads, -1))  # (B, S, H, E)
        return self.output_proj(ms_deform_attn(value, list(layout.values), *self.places(query, layout)))

    def places(self, query: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Query (B, Q, D) -> where it reads, as (x, y) in 0..1 (B, Q, H, L, K, 2), and with which weights, summing
        to 1 over L and K (B, Q, H, L, K)."""
        shape = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).unflatten(2, (*shape, 2))  # in cells, (B, Q, H, L, K, 2)
        weights = self.attention_weights(query).unflatten(2, (self.heads, -1))
        # Coordinates stay in float32 whatever the autocast dtype: bf16 cannot tell neighbouring pixels apart.
        dtype = layout.points.dtype
        weights = weights.to(dtype).softmax(-1).unflatten(3, shape[1:])  # (B, Q, H, L, K)
        return layout.points[:, None, None, None] + offsets.to(dtype) / layout.cells()[:, None], weights


class MSDeformMixer(Mixer):
    """Deformable attention of a map with itself: one level, heads of 16 channels if not given."""

    def __init__(self, dim: int, heads: int | None = None, points: int = 4) -> None:
        super().__init__()
        self.attn = MSDeformAttn(dim, 1, even_heads(dim, 16) if heads is None else heads, points, 1.0)
        self.attn.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        grid = (x.shape[-2], x.shape[-1])
        centres = cell_centres(grid, 1, x.device, torch.promote_types(x.dtype, torch.float32))
        layout = Layout((grid,), (grid,), centres / pair(grid[1], grid[0], centres))
        tokens = map_to_tokens(x)
        return tokens_to_map(self.attn(tokens, tokens, layout), grid)
