"""Grad-CAM (Selvaraju et al. 2017): which places speak for a class, or for the class of some pixels.

    w_k = mean_ij  dy / dA_kij,        L_ij = ReLU(sum_k w_k A_kij)

A are the maps that leave a block, or those of the pyramid, and y is the score: a logit, or for pixels the sum of the
logits there (Seg-Grad-CAM, Vinogradova et al. 2020). A is made a leaf where it arises, so that a frozen backbone gives
a gradient as well, whether or not ``Features.maps`` leads to the logits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.analysis.seen import check_query
from adaptkit.analysis.style import Drawn, panels, pictured, show
from adaptkit.analysis.watch import Watched, block_strides, chosen, map_strides, run_watched, single, source_of
from adaptkit.core.block import Block
from adaptkit.core.layers import indices
from adaptkit.core.tree import evaluating
from adaptkit.core.view import Features
from adaptkit.ops.grid import map_to_tokens
from adaptkit.seam import reference

__all__ = ["GradCAM", "grad_cam"]

Target = int | Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False)
class GradCAM(Drawn):
    """Where a score comes from."""

    cam: Tensor  #: (h, w), not negative
    score: float  #: y
    at: str  #: whose maps: ``"block 10"`` or ``"map 16"``, by its stride
    stride: int  #: side of a cell in pixels
    picture: np.ndarray
    target: str  #: what y is

    def draw(self, figure: Any) -> None:
        """The image, and over it the map resized bilinearly, as a share of its largest value."""
        height, width = self.picture.shape[:2]
        left, right = panels(figure, 2, 2, height / width, width=4.4, bar=0.6)
        left.set_title("image")
        right.set_title(f"{self.target}, {self.at}")
        show(left, self.picture)
        cam = self.cam[None, None] / self.cam.amax().clamp_min(1e-30)
        cam = F.interpolate(cam, scale_factor=float(self.stride), mode="bilinear")[0, 0, :height, :width]
        shown = show(right, self.picture, cam.numpy(), 1, 0.6, vmin=0, vmax=1)
        bar = figure.colorbar(shown, ax=[left, right], shrink=0.7, aspect=25, pad=0.015, label="of its largest")
        bar.solids.set_alpha(1)


def grad_cam(
    model: nn.Module,
    image: Tensor,
    target: Target | None = None,
    pixels: Tensor | tuple[int, int] | None = None,
    at: int | str | None = None,
) -> GradCAM:
    """Return where the score of a class comes from.

    Args:
        model: what ``attach`` returned, with a head or a backbone that classifies, or a bare backbone that does.
        image: one, (C, H, W), normalised as the backbone wants it.
        target: index of a class; None: the best one. Or a function of the logits that returns one number.
        pixels: for logits that are maps (B, classes, H, W): a mask (H, W), or one pixel (y, x); None: all pixels that
            get this class.
        at: the maps: those that leave a block (its index), or ``"map 8"``, those of the pyramid at this stride. None:
            the last place whose patches have a say, the coarsest map first where the head reads maps. In a ViT that
            classifies by its class token that is the last block but one.

    Raises ``TypeError`` for a model without logits, and ``ValueError`` where the place has no say in the score, and for
    a class, a pixel or a mask that is none.
    """
    one = single(image)
    watched = Watched.of(model)
    at = at if at is None or isinstance(at, str) else indices("at", [at])[0]
    asked = [at] if at is not None else [None, *reversed(range(watched.vit.spec.depth))]
    for place in asked:
        found = _try(model, watched, one, target, pixels, place)
        if found is not None:
            a, slope, score, leaf, said = found
            cam = (slope.mean((0, 1)) * a).sum(-1).relu().detach().float().cpu()
            (picture,) = pictured([one[0]], source_of(model, one.shape[1]))
            return GradCAM(cam, score, leaf.name, leaf.stride, picture, said)
    where = "no block has a say" if at is None else f"at={at!r} has no say"
    raise ValueError(
        f"{where} in this score: the logits do not depend on the patches there. A class token reads the "
        "patches in the last block, so that what they are behind it counts for nothing; choose an earlier block"
    )


class _Leaf(NamedTuple):
    a: Tensor  # A, (1, P+N, D) of a block or (1, D, h, w) of a map
    name: str  # "block 10" or "map 16"
    grid: tuple[int, int]
    stride: int  # side of a cell in pixels


def _try(
    model: nn.Module, watched: Watched, image: Tensor, target: Any, pixels: Any, at: int | str | None
) -> tuple[Tensor, Tensor, float, _Leaf, str] | None:
    """Return A (h, w, D), dy/dA, y, the place and the target; None where y does not depend on A."""
    made: list[_Leaf] = []
    index = chosen([at], watched.vit.spec.depth)[0] if isinstance(at, int) else -1

    def visit(block: Block, i: int, x: Tensor, y: Tensor) -> Tensor | None:
        if i != index:
            return None
        y = y.detach().requires_grad_()
        made[:] = [_Leaf(y, f"block {i}", block.grid or (0, 0), block_strides(watched.vit.spec)[i])]
        return y

    with torch.inference_mode(False), torch.enable_grad(), evaluating(model), reference():
        image = image.clone() if image.is_inference() else image
        features = run_watched(model, image, visit)
        if not isinstance(at, int):
            features = _map_as_leaf(features, map_strides(model, features), at, made)
            if not made:
                return None
        logits = watched.logits(features)
        score, said = _score(logits, target, pixels, image.shape[-2:])
        (leaf,) = made
        if not score.requires_grad:
            return None
        (slope,) = torch.autograd.grad(score, leaf.a, allow_unused=True)
    if slope is None:
        return None
    grid = leaf.grid
    tokens = (x if x.ndim == 3 else map_to_tokens(x) for x in (leaf.a, slope))
    a, slope = (t[0, t.shape[1] - grid[0] * grid[1] :].unflatten(0, grid) for t in tokens)
    return (a, slope, float(score.detach()), leaf, said) if bool(slope.any()) else None


def _map_as_leaf(features: Features, strides: Sequence[int], at: str | None, made: list[_Leaf]) -> Features:
    """Make a map of the pyramid a leaf: the one at ``"map <stride>"``, or the coarsest."""
    maps = {stride: i for i, stride in enumerate(strides)} if features.maps else {}
    if at is not None and (not at.startswith("map ") or not at[4:].isdecimal() or int(at[4:]) not in maps):
        there = ", ".join(f"'map {s}'" for s in maps) or "no map"
        raise ValueError(f"at={at!r}: give the index of a block, or a map of this model's pyramid; it makes {there}")
    if not maps:
        return features
    stride = max(maps) if at is None else int(at[4:])
    own = features.maps[maps[stride]].detach().requires_grad_()
    made[:] = [_Leaf(own, f"map {stride}", (own.shape[-2], own.shape[-1]), stride)]
    return features._replace(maps=tuple(own if i == maps[stride] else m for i, m in enumerate(features.maps)))


def _score(logits: Any, target: Any, pixels: Any, size: Sequence[int]) -> tuple[Tensor, str]:
    """Return y, and what it is."""
    if callable(target):
        return _one_number(target(logits)), getattr(target, "__name__", "score")
    try:
        target = None if target is None else operator.index(target)
    except TypeError as error:
        raise TypeError(f"target={target!r}: give the index of a class, or a function of the logits") from error
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 4):
        what = "no logits" if logits is None else f"{type(logits).__name__} for logits"
        raise TypeError(
            f"this model gives {what}; attach a head that classifies images (B, classes) or pixels (B, classes, H, W), "
            "or give as target a function of what it gives that returns one number"
        )
    if target is not None and not 0 <= target < logits.shape[1]:
        raise ValueError(f"target={target}: this model knows {logits.shape[1]} classes, 0 to {logits.shape[1] - 1}")
    if logits.ndim == 2:
        if pixels is not None:
            raise ValueError("pixels= is for logits that are maps; this model classifies whole images: leave it out")
        chosen_class = int(logits[0].argmax()) if target is None else target
        return logits[0, chosen_class], f"class {chosen_class}"
    if tuple(logits.shape[-2:]) != tuple(size):
        logits = F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)
    mask, best = _mask(pixels, size, logits.device), logits[0].argmax(0)
    if target is None:
        target = int((best if mask is None else best[mask]).flatten().mode().values)
    mask = best == target if mask is None else mask
    if not bool(mask.any()):
        raise ValueError(f"no pixel is class {target}; give pixels= a mask or a pixel, or another target")
    return logits[0, target][mask].sum(), f"class {target}, {int(mask.sum())} pixels"


def _one_number(score: Any) -> Tensor:
    """Raise ``TypeError`` for what is no score."""
    if not isinstance(score, Tensor) or score.numel() != 1:
        said = f"a tensor {tuple(score.shape)}" if isinstance(score, Tensor) else f"a {type(score).__name__}"
        raise TypeError(f"target= returns {said}; it must return one number, as a tensor that its gradient is taken of")
    return score.reshape(())


def _mask(pixels: Any, size: Sequence[int], device: torch.device) -> Tensor | None:
    if pixels is None:
        return None
    if isinstance(pixels, Tensor | np.ndarray) and pixels.shape != (2,):
        mask = torch.as_tensor(pixels).to(device).bool()
        if tuple(mask.shape) != tuple(size):
            raise ValueError(f"pixels has shape {tuple(mask.shape)} and the image {tuple(size)}; give a mask (H, W)")
        if not bool(mask.any()):
            raise ValueError("pixels is a mask of no pixel")
        return mask
    y, x = check_query(pixels, size, "pixels")  # as the other figures take a place: fractions are within a pixel
    mask = torch.zeros(tuple(size), dtype=torch.bool, device=device)
    mask[int(y), int(x)] = True
    return mask
