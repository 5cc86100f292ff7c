"""Where deformable attention reads: the points of every block, and the keys that count (DAT, figures 1 and 4)."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from adaptkit.analysis.attention import centres
from adaptkit.analysis.draw import sheet, to_picture
from adaptkit.analysis.seen import Seen, cell_of, look
from adaptkit.analysis.watch import single, source_of
from adaptkit.core.view import Source

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["AttendedKeys", "DeformedPoints", "SamplingPoints", "attended_keys", "deformed_points", "sampling_points"]

MANY = 1000  #: points of a group, from which on they are drawn small
SIDE, COLUMNS = 256, 3  #: least width of a tile in pixels; tiles in a row
COLOURS = ("#e4572e", "#17bebb", "#ffc914", "#76b041", "#8f5db7", "#2e86ab", "#f5cac3", "#3d3d3d")  #: one per group


class SamplingPoints(NamedTuple):
    """Where the queries of one grid read, in one deformable attention on one image."""

    points: Tensor  #: (Q, heads, L, K, 2) as (y, x) in pixels of the image; one outside of it reads zeros, or the edge
    weights: Tensor  #: (Q, heads, L, K), summing to 1 over L and K but for what prefix tokens get
    queries: Tensor  #: (Q, 2) centres of the queries as (y, x) in pixels
    grid: tuple[int, int]  #: (h, w) of the queries, Q = h * w row by row


class DeformedPoints(NamedTuple):
    """The picture, and what it shows."""

    picture: Image.Image
    points: dict[str, Tensor]  #: by attention: (groups or heads, n, 2), as (y, x) in pixels of the image


class AttendedKeys(NamedTuple):
    """The picture, and what it shows."""

    picture: Image.Image
    points: dict[str, Tensor]  #: by attention: (groups or heads, n, 2), as (y, x) in pixels of the image
    scores: dict[str, Tensor]  #: by attention: (groups or heads, n), attention on each, summed over the group's heads


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
    """Draw the points of every deformable block over the image, a colour for each group.

    Args:
        model: :class:`~adaptkit.models.DAT` or another model with deformable attention in it, or one with the adapter
            ``"dat"``, ``"vit-adapter"`` or ``"metaformer"`` with the mixer ``msda`` or ``dat``. Where each query has
            points of its own (``msda``) all of them are drawn, a colour for each head.
        image: (C, H, W) or (1, C, H, W), normalised as the backbone wants it.
        source: how the image is normalised; None asks the model.
        path: where to write the picture as well.

    Raises ``TypeError`` for a model without deformable attention, ``ValueError`` for a batch.
    """
    seen, shown, zoom = _look(model, image, source)
    points = {name: _all_points(s) for name, s in seen.items()}
    tiles = [("image", shown)]
    for name, at in points.items():
        radius = max(1.5, shown.width / 128) if at.shape[1] <= MANY else 1.0
        tiles.append((name, _circles(shown, at * zoom, torch.full(at.shape[:2], radius))))
    return DeformedPoints(_saved(sheet(tiles, COLUMNS), path), points)


@torch.no_grad()
def attended_keys(
    model: nn.Module,
    image: Tensor,
    query: tuple[float, float] | None = None,
    top: int = 0,
    source: Source | None = None,
    path: str | os.PathLike[str] | None = None,
) -> AttendedKeys:
    """Draw the important keys of every deformable block: circles whose radius grows with the attention they get.

    Args:
        model, image, source, path: as in :func:`deformed_points`.
        query: (y, x) in pixels, drawn as a star: the keys of the cell that holds it, summed over the heads of each
            group. None sums over all queries as well; where each query has points of its own, it shows those of all.
        top: draw so many keys of each group only; 0: an eighth of them, at least 8.
    """
    seen, shown, zoom = _look(model, image, source)
    points, scores = {}, {}
    tiles = [("image", shown if query is None else _star(shown, query, zoom))]
    for name, s in seen.items():
        points[name], scores[name] = _scored(s, query)
        score, index = scores[name].topk(min(scores[name].shape[1], top or max(8, scores[name].shape[1] // 8)))
        at = torch.stack([p[i] for p, i in zip(points[name], index)])
        radius = shown.width / 24 * score / score.amax().clamp_min(1e-12)
        tile = _circles(shown, at * zoom, radius.clamp_min(1.0), hollow=True)
        tiles.append((name, tile if query is None else _star(tile, query, zoom)))
    return AttendedKeys(_saved(sheet(tiles, COLUMNS), path), points, scores)


# ---- looking


def _seen(model: nn.Module, image: Tensor) -> dict[str, Seen]:
    seen = look(model, image)
    if not seen:
        raise TypeError(
            f"this {type(model).__name__} has no deformable attention; give a DAT, or attach the adapter 'dat', "
            "'vit-adapter' or 'metaformer' with mixer='msda' or 'dat'"
        )
    return seen


def _look(model: nn.Module, image: Tensor, source: Source | None) -> tuple[dict[str, Seen], Image.Image, int]:
    """Run the model once; return what its deformable attentions did, the image as a picture, and its magnification."""
    from PIL import Image

    image = single(image)
    seen = _seen(model, image)
    height, width = image.shape[-2:]
    zoom = max(1, -(-SIDE // width))
    picture = to_picture(image[0], source or source_of(model, image.shape[1]))
    return seen, picture.resize((width * zoom, height * zoom), Image.Resampling.BICUBIC), zoom


def _all_points(seen: Seen) -> Tensor:
    """Return the points of every query: (groups, n, 2), or (heads, n, 2) where each query has its own."""
    return seen.points.transpose(0, 1).flatten(1, 3)


def _scored(seen: Seen, query: tuple[float, float] | None) -> tuple[Tensor, Tensor]:
    """Return points (g, n, 2) and the attention (g, n) on each, of all queries or of the one at a pixel (y, x)."""
    groups, shared = seen.points.shape[1], len(seen.points) == 1
    weights = seen.weights.unflatten(1, (groups, -1)).sum(2)  # (Q, g, L, K)
    points = seen.points
    if query is not None:
        one = cell_of(query, seen)
        weights = weights[one : one + 1]
        points = points if shared else points[one : one + 1]
    elif shared:
        weights = weights.sum(0, keepdim=True)
    return points.transpose(0, 1).flatten(1, 3), weights.transpose(0, 1).flatten(1)


# ---- drawing


def _circles(shown: Image.Image, points: Tensor, radius: Tensor, hollow: bool = False) -> Image.Image:
    """points (g, n, 2) as (y, x) and radius (g, n), in pixels of the picture; each group has its colour."""
    from PIL import ImageDraw

    page = shown.copy()
    draw = ImageDraw.Draw(page)
    for group, (at, sizes) in enumerate(zip(points.tolist(), radius.tolist())):
        colour = COLOURS[group % len(COLOURS)]
        for (y, x), r in zip(at, sizes):
            box = (x - r, y - r, x + r, y + r)
            if hollow:
                draw.ellipse(box, outline=colour, width=2)
            else:
                draw.ellipse(box, fill=colour)
    return page


def _star(shown: Image.Image, query: tuple[float, float], zoom: int) -> Image.Image:
    from PIL import ImageDraw

    page, (y, x), r = shown.copy(), (v * zoom for v in query), shown.width / 28
    corners = []
    for k in range(10):
        angle, length = math.pi * k / 5, r if k % 2 == 0 else r * 0.4
        corners.append((x + length * math.sin(angle), y - length * math.cos(angle)))
    ImageDraw.Draw(page).polygon(corners, fill="yellow", outline="black")
    return page


def _saved(page: Image.Image, path: str | os.PathLike[str] | None) -> Image.Image:
    if path is not None:
        page.save(path)
    return page
