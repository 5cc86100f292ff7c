"""Where deformable attention reads: the points of every block, and the keys that count (DAT, figures 1 and 4)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from adaptkit.analysis.attention import centres
from adaptkit.analysis.seen import Seen, cell_of, check_query, look
from adaptkit.analysis.style import COLOURS, Drawn, panels, pictured, show, star
from adaptkit.analysis.watch import single, source_of
from adaptkit.core.view import Source

__all__ = [
    "AttendedKeys",
    "DeformedPoints",
    "SamplingPoints",
    "attended_keys",
    "brief",
    "deformed_points",
    "draw_keys",
    "sampling_points",
]

MANY = 400  #: points of a group; where more are read, some of the queries are drawn
COLUMNS = 4  #: panels in a row, at most


class SamplingPoints(NamedTuple):
    """Where the queries of one grid read, in one deformable attention on one image."""

    points: Tensor  #: (Q, heads, L, K, 2) as (y, x) in pixels of the image; one outside of it reads zeros, or the edge
    weights: Tensor  #: (Q, heads, L, K), summing to 1 over L and K but for what prefix tokens get
    queries: Tensor  #: (Q, 2) centres of the queries as (y, x) in pixels
    grid: tuple[int, int]  #: (h, w) of the queries, Q = h * w row by row


@dataclass(frozen=True, eq=False)
class DeformedPoints(Drawn):
    """Where deformable attention reads an image."""

    points: dict[str, Tensor]  #: by attention: (groups or heads, n, 2), as (y, x) in pixels of the image
    picture: np.ndarray
    #: by attention: (h, w) of the queries, where each has n / (h * w) points of its own, query by query
    grids: dict[str, tuple[int, int]] = field(default_factory=dict)

    def draw(self, figure: Any) -> None:
        """A panel for each attention, a colour for each group; points outside of the image are not seen.

        Where queries have points of their own and a group more than `MANY`, every second query is drawn in each
        direction, or third, ...
        """
        axes = _panels(figure, self.picture, self.points)
        for one, name in zip(axes, self.points):
            for group, at in enumerate(_thinned(self.points[name], self.grids.get(name))):
                one.scatter(at[:, 1], at[:, 0], s=9, edgecolors="white", linewidths=0.3, **_of_group(group))
        _legend(figure, axes)


@dataclass(frozen=True, eq=False)
class AttendedKeys(Drawn):
    """Which of the points count."""

    points: dict[str, Tensor]  #: by attention: (groups or heads, n, 2), as (y, x) in pixels of the image
    scores: dict[str, Tensor]  #: by attention: (groups or heads, n), attention on each, summed over the group's heads
    query: tuple[float, float] | None
    top: int  #: keys of each group that are drawn; 0: an eighth of them, at least 8
    picture: np.ndarray

    def draw(self, figure: Any) -> None:
        """A panel for each attention: a key is a circle whose area is its attention, the query a star."""
        draw_keys(figure, self.picture, self.points, self.scores, self.top, self.query)


@torch.no_grad()
def sampling_points(model: nn.Module, image: Tensor) -> dict[str, SamplingPoints]:
    """Return where every deformable attention reads an image, and with which weights.

    Injectors and extractors of ``"vit-adapter"`` (``msda`` and ``dat``), the mixers ``msda`` and ``dat`` in
    ``"metaformer"``, the adapter ``"dat"``, and the blocks of a :class:`~adaptkit.models.DAT`; by their names in the
    model, an extractor once for each stride of its queries.

    Args:
        model: as :func:`deformed_points`.
        image: (C, H, W) or (1, C, H, W), normalised as the backbone wants it.

    Raises ``TypeError`` for a model without deformable attention, ``ValueError`` for a batch.
    """
    found = {}
    for name, seen in _seen(model, single(image)).items():
        queries, heads = seen.weights.shape[:2]
        points = seen.points.repeat_interleave(heads // seen.points.shape[1], dim=1).expand(queries, -1, -1, -1, -1)
        at = centres(seen.grid, seen.stride, points.device)
        found[name] = SamplingPoints(points, seen.weights, at, seen.grid)
    return found


@torch.no_grad()
def deformed_points(
    model: nn.Module, image: Tensor, source: Source | None = None, path: str | os.PathLike[str] | None = None
) -> DeformedPoints:
    """Return the points of every deformable block on an image, to be drawn with a colour for each group.

    Args:
        model: :class:`~adaptkit.models.DAT` or another model with deformable attention in it, or one with the adapter
            ``"dat"``, ``"vit-adapter"`` or ``"metaformer"`` with the mixer ``msda`` or ``dat``. Where each query has
            points of its own (``msda``) the colours are heads, and of many queries some are drawn.
        image: (C, H, W) or (1, C, H, W), normalised as the backbone wants it.
        source: how the image is normalised; None asks the model.
        path: where to write the figure as well, as ``DeformedPoints.save`` does.

    Raises ``TypeError`` for a model without deformable attention, ``ValueError`` for a batch.
    """
    seen, picture = _look(model, image, source)
    points = {name: _all_points(s).cpu() for name, s in seen.items()}
    found = DeformedPoints(points, picture, {name: s.grid for name, s in seen.items() if len(s.points) > 1})
    if path is not None:
        found.save(path)
    return found


@torch.no_grad()
def attended_keys(
    model: nn.Module,
    image: Tensor,
    query: tuple[float, float] | None = None,
    top: int = 0,
    source: Source | None = None,
    path: str | os.PathLike[str] | None = None,
) -> AttendedKeys:
    """Return the keys of every deformable block and the attention that they get; ``query_keys`` tells other blocks too.

    Args:
        model, image, source, path: as in :func:`deformed_points`.
        query: (y, x) in pixels, drawn as a star: the keys of the cell that holds it, summed over the heads of each
            group. None sums over all queries as well; where each query has points of its own, it shows those of all.
        top: draw so many keys of each group only; 0: an eighth of them, at least 8.

    Raises ``ValueError`` for a query outside of the image, and what :func:`deformed_points` raises.
    """
    if query is not None:
        check_query(query, single(image).shape[-2:])
    seen, picture = _look(model, image, source)
    scored = {name: _scored(s, query) for name, s in seen.items()}
    points = {name: at.cpu() for name, (at, _) in scored.items()}
    scores = {name: score.cpu() for name, (_, score) in scored.items()}
    if top < 0:
        raise ValueError(f"top={top}: give how many keys of each group are drawn, or 0 for an eighth of them")
    found = AttendedKeys(points, scores, query, top, picture)
    if path is not None:
        found.save(path)
    return found


# ---- looking


def _seen(model: nn.Module, image: Tensor) -> dict[str, Seen]:
    seen = look(model, image)
    if not seen:
        raise TypeError(
            f"this {type(model).__name__} has no deformable attention; give a DAT, or attach the adapter 'dat', "
            "'vit-adapter' or 'metaformer' with mixer='msda' or 'dat'"
        )
    return seen


def _look(model: nn.Module, image: Tensor, source: Source | None) -> tuple[dict[str, Seen], np.ndarray]:
    """Run the model once; return what its deformable attentions did, and the pixels of the image."""
    image = single(image)
    seen = _seen(model, image)
    (picture,) = pictured([image[0]], source or source_of(model, image.shape[1]))
    return seen, picture


def _all_points(seen: Seen) -> Tensor:
    """Return the points of every query: (groups, n, 2), or (heads, n, 2) where each query has its own."""
    return seen.points.transpose(0, 1).flatten(1, 3).float()


def _scored(seen: Seen, query: tuple[float, float] | None) -> tuple[Tensor, Tensor]:
    """Return points (g, n, 2) and the attention (g, n) on each, of all queries or of the one at a pixel (y, x)."""
    groups, shared = seen.points.shape[1], len(seen.points) == 1
    weights = seen.weights.float().unflatten(1, (groups, -1)).sum(2)  # (Q, g, L, K)
    points = seen.points
    if query is not None:
        one = cell_of(query, seen)
        weights = weights[one : one + 1]
        points = points if shared else points[one : one + 1]
    elif shared:
        weights = weights.sum(0, keepdim=True)
    return points.transpose(0, 1).flatten(1, 3).float(), weights.transpose(0, 1).flatten(1)


# ---- drawing


def _thinned(points: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Points (groups, n, 2) -> those of some queries, evenly over their grid, where there are many."""
    if grid is None or points.shape[1] <= MANY:
        return points
    step = math.ceil(math.sqrt(points.shape[1] / MANY))
    return points.unflatten(1, (*grid, -1))[:, step // 2 :: step, step // 2 :: step].flatten(1, 3)


def draw_keys(
    figure: Any,
    picture: np.ndarray,
    points: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    top: int,
    query: tuple[float, float] | None,
) -> None:
    """Draw a panel for each attention on an empty figure.

    ``points`` (groups, n, 2) as (y, x) in pixels and ``scores`` (groups, n), by the panel's title. A key is a circle
    whose area is its share of the largest score of the panel, its colour the group; of each group the ``top`` are
    drawn, of 0 an eighth, at least 8. The query is a star.
    """
    axes = _panels(figure, picture, points)
    for one, (name, places) in zip(axes, points.items()):
        count = scores[name].shape[1]
        score, index = scores[name].topk(min(count, top or max(8, count // 8)))
        area = 2 + 110 * (score / score.amax().clamp_min(1e-12)).numpy()
        for group, (at, sizes, i) in enumerate(zip(places, area, index)):
            one.scatter(at[i, 1], at[i, 0], s=sizes, alpha=0.75, edgecolors="white", linewidths=0.5, **_of_group(group))
        if query is not None:
            star(one, query)
    _legend(figure, axes)


def _panels(figure: Any, picture: np.ndarray, points: Mapping[str, Tensor]) -> list[Any]:
    """A panel with the picture and its title for each attention."""
    axes = panels(figure, len(points), COLUMNS, picture.shape[0] / picture.shape[1])
    for one, name in zip(axes, points):
        show(one, picture)
        one.set_title(brief(name), fontsize=7)
    return axes


def brief(name: str) -> str:
    """``vit-adapter.interactions.3.extractor.attn, stride 8`` -> ``extractor 3, stride 8``."""
    found = re.match(r"vit-adapter\.interactions\.(\d+)\.(injector|extractor|extra_extractors\.(\d+))\.attn", name)
    if found is None:
        return name
    return (f"extra extractor {found[3]}" if found[3] else f"{found[2]} {found[1]}") + name[found.end() :]


def _of_group(group: int) -> dict[str, Any]:
    return {"color": COLOURS[group % len(COLOURS)], "label": f"group {group}"}


def _legend(figure: Any, axes: list[Any]) -> None:
    """Say which colour is which group, where there is more than one."""
    handles, labels = max((a.get_legend_handles_labels() for a in axes), key=lambda pair: len(pair[0]))
    if len(handles) > 1:
        columns = max(1, min(8, len(handles), int(figure.get_figwidth() / 0.9)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, markerscale=0.6)
