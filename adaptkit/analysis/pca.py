"""Tokens as colours (DINOv2, Oquab et al. 2024, figures 1 and 9).

The first principal component of the patch tokens of several images tells objects from what is behind them. Those on
the side of the objects are the foreground; the first three components of the foreground alone are red, green, blue, so
that the same part of two objects has the same colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from adaptkit.analysis.principal import Principal, principal
from adaptkit.analysis.style import Drawn, panels, pictured, show
from adaptkit.analysis.watch import BackboneAlone, Watched, batch, block_strides, source_of
from adaptkit.core.layers import check_choice
from adaptkit.core.tree import evaluating
from adaptkit.model.adapted import AdaptedModel

__all__ = ["FeaturePCA", "feature_pca", "features_of", "otsu"]

Side = Literal["middle", "high", "low", "all"]


@dataclass(frozen=True, eq=False)
class FeaturePCA(Drawn):
    """Patch tokens of some images in one basis."""

    maps: tuple[Tensor, ...]  #: of each image: (h, w, 3), colours in 0..1; 0 in the background
    masks: tuple[Tensor, ...]  #: of each image: (h, w), what is foreground
    first: tuple[Tensor, ...]  #: of each image: (h, w), the component that was cut, 0..1 over all images
    threshold: float  #: where it was cut
    basis: Principal  #: of the foreground
    stride: int
    pictures: tuple[np.ndarray, ...]

    def draw(self, figure: Any) -> None:
        """Each image, and below it its colours; the background is white."""
        tall = max(p.shape[0] / p.shape[1] for p in self.pictures)
        for i, tile in enumerate(panels(figure, len(self.pictures), 6, 2 * tall, title=0.02)):
            above, below = (figure.add_subplot(half) for half in tile.get_subplotspec().subgridspec(2, 1))
            above.set_axis_off()
            below.set_axis_off()
            show(above, self.pictures[i])
            colours = torch.where(self.masks[i][..., None], self.maps[i], 1.0).numpy()
            show(below, None, colours, self.stride, 1.0)
            below.set_xlim(-0.5, self.pictures[i].shape[1] - 0.5)
            below.set_ylim(self.pictures[i].shape[0] - 0.5, -0.5)


@torch.no_grad()
def feature_pca(
    model: nn.Module,
    images: Tensor | Sequence[Tensor],
    foreground: Side = "middle",
    threshold: float | None = None,
) -> FeaturePCA:
    """Colour the patch tokens after the final norm; of a hierarchical backbone those of the last stage.

    Args:
        model: what ``attach`` returned, or a bare backbone.
        images: as :func:`attention_distance`; all share one basis.
        foreground: which side of the threshold it is: ``"high"`` or ``"low"`` on the first component, ``"middle"`` the
            one that is seldom at the edges of the images, ``"all"`` takes every patch.
        threshold: in 0..1 over the range of the first component; None: where the two sides differ most (Otsu 1979).

    Signs are fixed, so that the same images have the same colours on every machine.
    """
    check_choice("foreground", foreground, ("middle", "high", "low", "all"))
    given = batch(images)
    seen = [features_of(model, image) for image in given]
    tokens = [f.tokens[0].float().cpu() for f in seen]
    grids = [f.grid for f in seen]
    first = principal(torch.cat(tokens), 1)(torch.cat(tokens))[:, 0]
    first = (first - first.amin()) / (first.amax() - first.amin()).clamp_min(1e-12)
    cut = otsu(first) if threshold is None else threshold
    parts = list(first.split([len(t) for t in tokens]))
    masks = [part > cut for part in parts]
    if foreground == "all":
        masks = [torch.ones_like(mask) for mask in masks]
    elif foreground == "low" or (foreground == "middle" and _is_edge(masks, grids)):
        masks = [~mask for mask in masks]
    if sum(int(mask.sum()) for mask in masks) < 4:
        raise ValueError(
            f"threshold={cut:g} leaves less than four of {sum(map(len, masks))} patches in front; choose another, "
            "foreground='all', or larger images"
        )
    basis = principal(torch.cat([t[m] for t, m in zip(tokens, masks)]), 3)
    values = [basis(t) for t in tokens]
    front = torch.cat([v[m] for v, m in zip(values, masks)])
    low, high = (front.quantile(q, dim=0) for q in (0.01, 0.99))
    colours = [((v - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) * m[:, None] for v, m in zip(values, masks)]
    pictures = pictured([i[0] for i in given], source_of(model, given[0].shape[1]))
    return FeaturePCA(
        tuple(c.float().unflatten(0, g) for c, g in zip(colours, grids)),
        tuple(m.unflatten(0, g) for m, g in zip(masks, grids)),
        tuple(p.float().unflatten(0, g) for p, g in zip(parts, grids)),
        cut, basis, block_strides(Watched.of(model).vit.spec)[-1], pictures,
    )  # fmt: skip


def features_of(model: nn.Module, image: Tensor) -> Any:
    """Run a model as in evaluation: image (1, C, H, W) -> Features."""
    with evaluating(model):
        adapted = isinstance(model, AdaptedModel | BackboneAlone)
        return model(image) if adapted else Watched.of(model).vit.features(image)


def _is_edge(masks: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> bool:
    """Whether the patches of the masks lie at the edges of the images more often than elsewhere."""
    at_edge, inside = [], []
    for mask, grid in zip(masks, grids):
        edge = torch.ones(grid, dtype=torch.bool)
        edge[1:-1, 1:-1] = False
        at_edge.append(mask[edge.flatten()])
        inside.append(mask[~edge.flatten()])
    middle = torch.cat(inside).float()
    return bool(torch.cat(at_edge).float().mean() > (middle.mean() if len(middle) else 0.5))


def otsu(values: Tensor, bins: int = 256) -> float:
    """Return the threshold of values in 0..1 at which the variance between the two sides is largest (Otsu 1979)."""
    counts = torch.histc(values.float(), bins, 0, 1).double()
    centre = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    below, total = counts.cumsum(0), counts.sum()
    mass = (counts * centre).cumsum(0)
    above = (total - below).clamp_min(1e-12)
    between = below * above * (mass / below.clamp_min(1e-12) - (mass[-1] - mass) / above) ** 2
    best = between[:-1] == between[:-1].amax()  # the middle of a gap between the sides, where all are the same
    return float((best.nonzero().float().mean() + 1) / bins)
