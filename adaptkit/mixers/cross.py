"""The cross form of a mixer that only knows its own map: bring the values there, then mix.

No paper defines it; it is ours, so that the plainest mixers can stand in an injector or an extractor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adaptkit.mixers.base import CrossMixer, Layout
from adaptkit.ops import ms_deform_attn
from adaptkit.ops.grid import map_to_tokens, tokens_to_map

__all__ = ["Resampled", "resample_levels"]


class Resampled(CrossMixer):
    """``output_proj(mixer(mean over levels of value_proj(feat), at the queries' places))``.

    The queries decide where to read, not what: their content is not looked at.
    """

    reads_query = False

    def __init__(self, dim: int, width: int, mixer: nn.Module) -> None:
        super().__init__()
        self.value_proj = nn.Linear(dim, width, bias=False)  # a constant goes through to `output_proj`, which has one
        self.mixer = mixer
        self.output_proj = nn.Linear(width, dim)

    def forward(self, query: Tensor, feat: Tensor, layout: Layout) -> Tensor:
        """Query (B, Q, D), feat (B, S, D) -> (B, Q, D)."""
        x = resample_levels(self.value_proj(feat), layout)
        parts = x.split([h * w for h, w in layout.queries], dim=1)
        mixed = [map_to_tokens(self.mixer(tokens_to_map(p, g))) for p, g in zip(parts, layout.queries)]
        return self.output_proj(torch.cat(mixed, dim=1))


def resample_levels(feat: Tensor, layout: Layout) -> Tensor:
    """(B, S, C) -> (B, Q, C): the mean of the levels at the centre of each query, bilinear, zero outside."""
    levels = len(layout.values)
    places = layout.points[None, :, None, None, None, :].expand(-1, -1, -1, levels, -1, -1)  # (1, Q, 1, L, 1, 2)
    weights = layout.points.new_full((1, 1, 1, 1, 1), 1 / levels)
    return ms_deform_attn(feat[:, :, None], list(layout.values), places, weights)
