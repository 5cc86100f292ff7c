"""Multi-scale deformable attention as a mixer: each query reads a few points that it places itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from adaptkit.mixers.base import CrossMixer, Layout, Mixer, Norms, even_heads
from adaptkit.ops import ms_deform_attn
from adaptkit.ops.device import pair
from adaptkit.ops.forget import forgotten
from adaptkit.ops.grid import cell_centres, map_to_tokens, tokens_to_map
from adaptkit.ops.linear import add_linear, branch_linear, linear, norm_linear
from adaptkit.ops.softmax import grouped_softmax

__all__ = ["MSDeformAttn", "MSDeformMixer"]


class MSDeformAttn(CrossMixer):
    """Multi-scale deformable attention (Deformable DETR, eq. 3) with a narrower value: ``ratio`` of D.

    Its host initialises it, by ``reset_parameters`` and after everything else.
    """

    def __init__(self, dim: int, levels: int, heads: int, points: int, ratio: float) -> None:
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        width = int(dim * ratio)
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

    def forward(self, query: Tensor, feat: Tensor, layout: Layout) -> Tensor:
        """Query (B, Q, D), feat (B, S, D) -> (B, Q, D)."""
        return self.normed(query, feat, layout, (nn.Identity(), nn.Identity()))

    def normed(self, query: Tensor, feat: Tensor, layout: Layout, norms: Norms) -> Tensor:
        """Without holding what is normed."""
        _, read = self._reader(query, feat, layout, norms)
        sampled = read()
        with forgotten((sampled, read)):
            return linear(sampled, self.output_proj.weight, self.output_proj.bias)

    def onto(self, query: Tensor, feat: Tensor, layout: Layout, norms: Norms) -> Tensor:
        """The projection is summed where the queries are."""
        query, read = self._reader(query, feat, layout, norms)
        sampled = read()
        with forgotten((sampled, read)):
            return add_linear(query, sampled, self.output_proj.weight, self.output_proj.bias)

    def _reader(self, query: Tensor, feat: Tensor, layout: Layout, norms: Norms) -> tuple[Tensor, Callable[[], Tensor]]:
        """Place the points: the query as a residual takes it, and a function that reads there: (B, Q, width)."""
        shape = (self.heads, self.levels, self.points)
        value = norm_linear(feat, norms[1], self.value_proj.weight, self.value_proj.bias).unflatten(2, (self.heads, -1))
        # Coordinates stay in float32 whatever the autocast dtype: bf16 cannot tell neighbouring pixels apart.
        points = layout.points
        query, offsets, weights = self._places(query, norms[0], layout.cells())
        locations = points[:, None, None, None, :] + offsets.unflatten(2, (*shape, 2)).to(points.dtype)
        weights = grouped_softmax(weights.to(points.dtype), self.heads).unflatten(2, shape)
        return query, partial(ms_deform_attn, value, list(layout.values), locations, weights)

    def _places(self, query: Tensor, norm: nn.Module, cells_xy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, Q, D) -> the same, offsets (B, Q, H * L * K * 2) over the extent of a level, logits (B, Q, H * L * K).

        Both layers read the query once, and cells become shares of the extent in the weights, which are few.
        """
        offsets, logits = self.sampling_offsets, self.attention_weights
        cells_of = cells_xy[:, None].expand(self.heads, -1, self.points, -1).flatten().to(offsets.weight.dtype)
        weight = torch.cat([offsets.weight / cells_of[:, None], logits.weight])
        bias = torch.cat([offsets.bias / cells_of, logits.bias])
        query, places = branch_linear(query, norm, weight, bias)
        return query, *places.split([offsets.out_features, logits.out_features], dim=-1)


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
