"""Where deformable attention reads: the points of every block, and the keys that count (DAT, figures 1 and 4)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from adaptkit.adapters.base import BlockAdapter, SideAdapter, Trace, WrappedViT
from adaptkit.adapters.dat import DATKV, DATBlock
from adaptkit.analysis.draw import sheet, to_picture
from adaptkit.core.view import Block, Fn, Source
from adaptkit.mixers.dat import Convention, DeformableAttention, to_cells
from adaptkit.model.adapted import AdaptedModel

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["AttendedKeys", "DeformedPoints", "attended_keys", "deformed_points"]

SIDE, COLUMNS = 256, 3  #: least width of a tile in pixels; tiles in a row
COLOURS = ("#e4572e", "#17bebb", "#ffc914", "#76b041", "#8f5db7", "#2e86ab", "#f5cac3", "#3d3d3d")  #: one per group


class Seen(NamedTuple):
    """One deformable attention on one image."""

    points: Tensor  #: (g, n, 2) as (y, x) in pixels of the image
    weights: Tensor  #: (heads, h*w, n) of the queries that are cells
    grid: tuple[int, int]  #: (h, w) of the queries
    stride: int  #: side of a cell in pixels


class DeformedPoints(NamedTuple):
    """The picture, and what it shows."""

    picture: Image.Image
    points: dict[str, Tensor]  #: by block: (groups, n, 2), as (y, x) in pixels of the image


class AttendedKeys(NamedTuple):
    """The picture, and what it shows."""

    picture: Image.Image
    points: dict[str, Tensor]  #: by block: (groups, n, 2), as (y, x) in pixels of the image
    scores: dict[str, Tensor]  #: by block: (groups, n), attention on each key, summed over its group's heads


@torch.no_grad()
def deformed_points(
    model: nn.Module, image: Tensor, source: Source | None = None, path: str | os.PathLike[str] | None = None
) -> DeformedPoints:
    """Draw the points of every deformable block over the image, a colour for each group.

    Args:
        model: :class:`~adaptkit.models.DAT` or another model with deformable attention in it, or one with the adapter
            ``"dat"``.
        image: (C, H, W) or (1, C, H, W), normalised as the backbone wants it.
        source: how the image is normalised; None asks the model.
        path: where to write the picture as well.

    Raises ``TypeError`` for a model without deformable attention, ``ValueError`` for a batch.
    """
    seen, shown, zoom = _look(model, image, source)
    points = {name: s.points for name, s in seen.items()}
    tiles = [("image", shown)]
    for name, at in points.items():
        radius = max(1.5, shown.width / 128)
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
            group. None sums over all queries as well.
        top: draw so many keys of each group only; 0: an eighth of them, at least 8.
    """
    seen, shown, zoom = _look(model, image, source)
    points, scores = {name: s.points for name, s in seen.items()}, {}
    tiles = [("image", shown if query is None else _star(shown, query, zoom))]
    for name, s in seen.items():
        by_group = s.weights.unflatten(0, (len(s.points), -1)).sum(1)  # (g, queries, n)
        scores[name] = by_group.sum(1) if query is None else by_group[:, _cell(query, s)]
        score, index = scores[name].topk(min(scores[name].shape[1], top or max(8, scores[name].shape[1] // 8)))
        at = torch.stack([p[i] for p, i in zip(points[name], index)])
        radius = shown.width / 24 * score / score.amax().clamp_min(1e-12)
        tile = _circles(shown, at * zoom, radius.clamp_min(1.0), hollow=True)
        tiles.append((name, tile if query is None else _star(tile, query, zoom)))
    return AttendedKeys(_saved(sheet(tiles, COLUMNS), path), points, scores)


# ---- looking


def _look(model: nn.Module, image: Tensor, source: Source | None) -> tuple[dict[str, Seen], Image.Image, int]:
    """Run the model once; return what its deformable attentions did, the image as a picture, and its magnification."""
    from PIL import Image

    image = image[None] if image.ndim == 3 else image
    if image.shape[0] != 1:
        raise ValueError(f"image has shape {tuple(image.shape)}: a batch of {len(image)}; give one image")
    with _evaluating(model):
        seen = _seen_by_mixers(model, image)
        if isinstance(model, AdaptedModel):
            seen |= _seen_by_adapter(model, image)
    if not seen:
        raise TypeError(
            f"this {type(model).__name__} has no deformable attention; give a DAT, or attach the adapter 'dat'"
        )
    height, width = image.shape[-2:]
    zoom = max(1, -(-SIDE // width))
    picture = to_picture(image[0], source or _source(model, image.shape[1]))
    return seen, picture.resize((width * zoom, height * zoom), Image.Resampling.BICUBIC), zoom


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _source(model: nn.Module, channels: int) -> Source:
    if isinstance(model, AdaptedModel):
        return model.vit.source()
    from adaptkit.backbones._timm import cfg_source

    return cfg_source(getattr(model, "pretrained_cfg", None), 0, channels)


def _seen_by_mixers(model: nn.Module, image: Tensor) -> dict[str, Seen]:
    """Look at every :class:`DeformableAttention` in the model, wherever it sits, by the map it is given."""
    inputs: dict[str, Tensor] = {}
    mixers = {name: m for name, m in model.named_modules() if isinstance(m, DeformableAttention)}

    def keep(name: str, mixer: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0]

    hooks = [m.register_forward_pre_hook(partial(keep, name)) for name, m in mixers.items()]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    seen = {}
    for name, x in inputs.items():
        got = mixers[name].read(x, weights=True)
        weights = cast(Tensor, got.weights)[0]
        grid, stride = (x.shape[2], x.shape[3]), _stride(model, name, x, image)
        seen[name] = Seen(_pixels(got.points, grid, mixers[name].convention, stride), weights, grid, stride)
    return seen


def _stride(model: nn.Module, name: str, x: Tensor, image: Tensor) -> int:
    """Pixels from cell to cell of a map ``x``; a guess for a model of which nothing is known."""
    from adaptkit.models.dat import DAT

    if isinstance(model, AdaptedModel):
        return model.spec.patch_size
    if isinstance(model, DAT):
        return model.feature_info[int(name.split(".")[1])]["reduction"]
    return -(-image.shape[-2] // x.shape[2])


class _Watch(BlockAdapter):
    """DAT-KV as it is, noting what every block attends to."""

    inside = True

    def __init__(self, dat: DATKV, seen: dict[str, Seen]) -> None:
        super().__init__(dat.spec, dat.config)
        self.dat, self.seen = dat, seen

    def wrap(self, block: Block, index: int, trace: Trace) -> Fn:
        """(B, P+N, D) -> (B, P+N, D)."""
        run = self.dat.wrap(block, index, trace)
        return partial(self._run, run, block, index) if index in self.dat.config.blocks else run

    def _run(self, run: Fn, block: Block, index: int, x: Tensor) -> Tensor:
        weights, points = cast(DATBlock, self.dat.blocks[str(index)]).weights(block, x)
        grid, patch = cast(tuple[int, int], block.grid), self.spec.patch_size
        prefix = x.shape[1] - grid[0] * grid[1]
        at = _pixels(points, grid, "exact", patch)
        self.seen[f"block {index}"] = Seen(at, weights[0, :, prefix:, prefix:], grid, patch)
        return run(x)


def _seen_by_adapter(model: AdaptedModel, image: Tensor) -> dict[str, Seen]:
    """Run the model as it runs, its DAT-KV watched."""
    seen: dict[str, Seen] = {}
    blocks = [a for a in model.adapters.values() if isinstance(a, BlockAdapter)]
    watched = [_Watch(a, seen) if isinstance(a, DATKV) else a for a in blocks]
    trace: Trace = {}
    vit = WrappedViT(model.vit, watched, trace)
    sides = [a for a in model.adapters.values() if isinstance(a, SideAdapter)]
    if sides:
        sides[0](vit, image, trace)
    else:
        vit.features(image)
    return seen


def _pixels(points: Tensor, grid: tuple[int, int], convention: Convention, stride: int) -> Tensor:
    """(1, g, Hk, Wk, 2) in -1..1 -> (g, n, 2) in pixels: the place that is read, whatever the convention."""
    return (to_cells(points[0].flatten(1, 2), grid, convention) + 0.5) * stride


def _cell(query: tuple[float, float], seen: Seen) -> int:
    """Return the index of the cell that holds a pixel (y, x)."""
    y, x = (min(max(int(v // seen.stride), 0), n - 1) for v, n in zip(query, seen.grid))
    return y * seen.grid[1] + x


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
