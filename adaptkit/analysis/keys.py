"""What a query reads, side by side: plain ViT, Swin, DAT, injectors and extractors (DAT, Xia et al. 2022, figure 4)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptkit.analysis.attention import Attention, attentions
from adaptkit.analysis.maps import query_cell
from adaptkit.analysis.points import brief, draw_keys
from adaptkit.analysis.seen import Seen, look
from adaptkit.analysis.style import Drawn, pictured
from adaptkit.analysis.watch import Watched, chosen, named_models, single, source_of

__all__ = ["QueryKeys", "offset_lengths", "query_keys"]

OF_DAT = re.compile(r"(?:backbone\.)?stages\.(\d+)\.attns\.(\d+)")  #: deformable attention of a DAT, bare or adapted


@dataclass(frozen=True, eq=False)
class QueryKeys(Drawn):
    """The keys of one query, in several attentions."""

    points: dict[str, Tensor]  #: by attention: (groups, n, 2) as (y, x) in pixels
    scores: dict[str, Tensor]  #: by attention: (groups, n) attention on each, mean over the heads of the group
    query: tuple[float, float]
    top: int  #: keys of each group that are drawn
    picture: np.ndarray

    def draw(self, figure: Any) -> None:
        """A panel for each: the query is a star, a key a circle whose area is its attention, a colour a group."""
        draw_keys(figure, self.picture, self.points, self.scores, self.top, self.query)


def query_keys(
    models: nn.Module | Mapping[str, nn.Module],
    image: Tensor,
    query: tuple[float, float],
    blocks: int | Sequence[int] | None = None,
    modules: Sequence[str] | None = None,
    top: int = 16,
) -> QueryKeys:
    """Return what a query attends to, in one model or in several by name.

    Args:
        models: what ``attach`` returned, bare backbones, or :class:`~adaptkit.models.DAT`.
        image: one, (C, H, W), normalised as all of them want it.
        query: (y, x) in pixels.
        blocks: of the backbones; None: of each model one, the last whose stride is nearest to 16 pixels, and of a DAT
            the last of its deformable ones.
        modules: of an adapter, by their names in ``sampling_points``; None: those that come last, which are one
            injector and one extractor of ViT-Adapter, this once for each stride.
        top: how many keys of each group are drawn.

    Raises ``TypeError`` for a model that shows no attention, ``ValueError`` for a query outside of the image.
    """
    named = named_models(models, "")
    if top < 1:
        raise ValueError(f"top={top}: at least one key of each group is drawn")
    one = single(image)
    size = (one.shape[-2], one.shape[-1])
    points: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    for name, model in named.items():
        for said, seen in _of_model(model, one, blocks, modules).items():
            label = f"{name}, {said}" if name else said
            points[label], scores[label] = _of_query(seen, query_cell(query, seen, size))
    (picture,) = pictured([one[0]], source_of(next(iter(named.values())), one.shape[1]))
    return QueryKeys(points, scores, query, top, picture)


@torch.no_grad()
def _of_model(model: nn.Module, image: Tensor, blocks: Any, modules: Any) -> dict[str, Seen]:
    """Return what is to be shown of a model, by name."""
    deformable = {name: seen for name, seen in look(model, image).items() if not name.startswith("block ")}
    own = _of_backbone(model, deformable)
    if own and blocks is None:  # a DAT, which is seen by its points
        best = min(_far(seen) for _, seen in own.values())
        found = dict([[pair for pair in own.values() if _far(pair[1]) == best][-1]])
    else:
        taken = None if blocks is None else chosen(blocks, Watched.of(model).vit.spec.depth)
        found = {own[b][0]: own[b][1] for b in taken or () if b in own}
        if not (found and own.keys() >= set(taken or ())):
            found |= _of_blocks(model, image, taken and [b for b in taken if b not in own], bool(deformable))
    if modules is not None:
        unknown = [name for name in modules if name not in deformable]
        if unknown:
            raise ValueError(f"no deformable attention is named {unknown[0]!r}; there are {', '.join(deformable)}")
        return found | {brief(name): deformable[name] for name in modules}
    adapters = {name: seen for name, seen in deformable.items() if not OF_DAT.fullmatch(name)}
    return found | {brief(name): seen for name, seen in _last(adapters).items()}


def _of_backbone(model: nn.Module, deformable: dict[str, Seen]) -> dict[int, tuple[str, Seen]]:
    """Of deformable attention that is a backbone's own: its name and what it did, by the number of its block."""
    places = {name: found for name in deformable if (found := OF_DAT.fullmatch(name))}
    depths = Watched.of(model).vit.spec.depths if places else ()
    return {
        sum(depths[: int(found[1])]) + int(found[2]): (name.removeprefix("backbone."), deformable[name])
        for name, found in places.items()
    }


def _of_blocks(model: nn.Module, image: Tensor, blocks: Any, may_be_none: bool) -> dict[str, Seen]:
    """Return what blocks attend to, by name; of None the last one of the stride that is nearest to 16 pixels."""
    found: dict[str, Seen] = {}

    def keep(attention: Attention) -> None:
        seen = attention.patches
        if blocks is None:  # the others are not kept
            for name in [n for n, s in found.items() if _far(s) >= _far(seen)]:
                del found[name]
            if any(_far(s) < _far(seen) for s in found.values()):
                return
        found[f"block {attention.block}"] = seen

    try:
        attentions(model, image, keep, blocks)
    except TypeError:
        if not may_be_none:
            raise
    return found


def _last(deformable: dict[str, Seen]) -> dict[str, Seen]:
    """Of modules that come again and again with another number, those of the last number; no extra extractors."""
    own = {name: seen for name, seen in deformable.items() if "extra_extractors" not in name}
    latest = {re.sub(r"\d+", "#", name.partition(", ")[0]) + name.partition(", ")[2]: name for name in own}
    return {name: own[name] for name in own if name in latest.values()}


def _far(seen: Seen) -> float:
    return abs(math.log2(seen.stride / 16))


def _of_query(seen: Seen, query: int) -> tuple[Tensor, Tensor]:
    """Return points (g, n, 2) and attention (g, n) of one query."""
    points = seen.points[query if len(seen.points) > 1 else 0]  # (G, L, K, 2)
    groups = points.shape[0]
    weights = seen.weights[query].unflatten(0, (groups, -1)).mean(1)  # (G, L, K)
    return points.expand(*weights.shape, 2).flatten(1, 2).cpu().float(), weights.flatten(1).cpu().float()


# ---- numbers


@dataclass(frozen=True)
class Offsets:
    """How far the points of one attention have moved, and whether to the object."""

    mean: float  #: length in pixels
    largest: float
    cells: float  #: mean length in cells of its keys' grid, or of its queries' where each has points of its own
    in_object: float | None = None  #: share of the points inside of the object
    stood_in_object: float | None = None  #: the same of the places where they stood before they moved
    attention_in_object: float | None = None  #: share of the attention on points inside, of queries inside


@torch.no_grad()
def offset_lengths(model: nn.Module, image: Tensor, mask: Tensor | None = None) -> dict[str, Offsets]:
    """Measure how far every deformable attention moves its points on an image (C, H, W).

    Args:
        model: as ``sampling_points``.
        image: one, normalised as the backbone wants it.
        mask: (H, W), where an object is: how many of the points lie on it, and how much of its queries' attention.
            Chance is the share of the mask; ``stood_in_object`` is where the points would be without offsets.

    Raises ``TypeError`` for a model without deformable attention, ``ValueError`` for a mask of another size.
    """
    one = single(image)
    mask = None if mask is None else torch.as_tensor(mask)
    if mask is not None and tuple(mask.shape) != tuple(one.shape[-2:]):
        raise ValueError(f"mask has shape {tuple(mask.shape)} and the image {tuple(one.shape[-2:])}; give (H, W)")
    seen = {name: s for name, s in look(model, one).items() if s.reference is not None}
    if not seen:
        raise TypeError("this model has no deformable attention; give a DAT, or attach 'dat' or 'vit-adapter'")
    return {name: _moved(s, None if mask is None else mask.to(s.points.device).bool()) for name, s in seen.items()}


def _moved(seen: Seen, mask: Tensor | None) -> Offsets:
    stood = seen.reference
    if stood is None:
        raise TypeError("points that cannot move have no offsets")
    lengths = (seen.points - stood).norm(dim=-1)
    shared = len(seen.points) == 1
    cell = seen.stride * math.sqrt(seen.weights.shape[0] / seen.points.shape[3]) if shared else seen.stride
    numbers = float(lengths.mean()), float(lengths.max()), float(lengths.mean()) / cell
    if mask is None:
        return Offsets(*numbers)
    inside, before = _in(mask, seen.points), _in(mask, stood).expand(seen.points.shape[:-1])
    height, width = mask.shape
    rows, columns = ((torch.arange(n, device=mask.device) * seen.stride + seen.stride // 2) for n in seen.grid)
    own = mask[rows.clamp(max=height - 1)[:, None], columns.clamp(max=width - 1)].flatten()  # (Q,) queries on it
    groups = seen.points.shape[1]
    weights = seen.weights.unflatten(1, (groups, -1))  # (Q, G, heads / G, L, K)
    on = (weights * inside[:, :, None]).sum((1, 2, 3, 4)) / weights.sum((1, 2, 3, 4)).clamp_min(1e-12)
    share = float(on[own].mean()) if bool(own.any()) else None
    return Offsets(*numbers, float(inside.float().mean()), float(before.float().mean()), share)


def _in(mask: Tensor, points: Tensor) -> Tensor:
    """Points (..., 2) as (y, x) in pixels -> whether each is on the mask; outside of the image it is not."""
    place = points.floor().long()
    height, width = mask.shape
    valid = (place[..., 0] >= 0) & (place[..., 0] < height) & (place[..., 1] >= 0) & (place[..., 1] < width)
    return mask[place[..., 0].clamp(0, height - 1), place[..., 1].clamp(0, width - 1)] & valid
