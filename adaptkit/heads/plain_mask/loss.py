"""The loss on a set of masks (Mask2Former, Cheng et al. 2022, section 3.3; as in DETR, Carion et al. 2020).

Queries and targets of an image are matched one to one so that the sum of costs is least, and a matched query is to have
its target's class and mask, any other one the class "nothing"::

    cost = -2 p(class) + 5 bce(mask) + 5 dice(mask)              of each pair, on the same random points
    loss =  2 ce(class) + (5 sum bce(mask) + 5 sum dice(mask)) / targets

    dice = 1 - (2 sum m t + 1) / (sum m + sum t + 1)

Masks are compared on points, not pixels: of three times as many random ones those whose logit is nearest to 0, and a
quarter at random (PointRend, Kirillov et al. 2020). A class "nothing" weighs a tenth.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.heads.base import QueryLogits
from adaptkit.ops.grid import pair
from adaptkit.seam import full_precision

__all__ = ["set_loss"]

CLASS, BCE, DICE, NOTHING = 2.0, 5.0, 5.0, 0.1
OVERSAMPLE, IMPORTANT = 3, 0.75
SLACK = 0.01  #: by which resampling may leave 0..1

Target = tuple[Tensor, Tensor]  #: masks (n, H, W) in 0..1 and labels (n,) of one image


def set_loss(
    predictions: Sequence[QueryLogits],
    targets: Sequence[Target],
    points: int = 12544,
    extent: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Return the sum over predictions of the loss above; each is matched by itself.

    Args:
        predictions: of a batch of B images.
        targets: of each image masks (n, H, W) in 0..1 and labels (n,); n may be 0.
        points: of each mask that are looked at.
        extent: the shares of the height and the width of predicted masks that the image covers; the rest is padding.

    Raises ``ValueError`` for another number of targets than images, other shapes, labels of no class, masks beyond
    0..1, or more masks than queries, and ``ImportError`` without scipy.
    """
    last = predictions[-1].masks_queries_logits
    _check(targets, len(last))
    most = max((len(labels) for _, labels in targets), default=0)
    if most > last.shape[1]:
        raise ValueError(
            f"an image has {most} masks, and there are {last.shape[1]} queries: raise num_q to that or more"
        )
    targets = [(masks.to(last.device).float(), labels.to(last.device, torch.int64)) for masks, labels in targets]
    with full_precision(last):
        found = [QueryLogits(p.class_queries_logits.float(), p.masks_queries_logits.float()) for p in predictions]
        pairs = _matched(found, targets, points, extent)
        count = _mean_count(sum(len(labels) for _, labels in targets), last)
        return torch.stack([_loss(p, targets, own, count, points, extent) for p, own in zip(found, pairs)]).sum()


def _check(targets: Sequence[Target], images: int) -> None:
    """Check shapes and dtypes; values are checked with the copy of the costs, so that the device is waited for once."""
    wanted = "give masks (n, H, W) and labels (n,) for each image"
    if len(targets) != images:
        raise ValueError(f"{images} images, and targets of {len(targets)}: {wanted}")
    for number, (masks, labels) in enumerate(targets):
        shaped = masks.dim() == 3 and labels.dim() == 1 and len(masks) == len(labels)
        if not shaped or masks.numel() < len(labels):
            raise ValueError(
                f"image {number} has masks of {tuple(masks.shape)} and labels of {tuple(labels.shape)}: {wanted}"
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"image {number} has labels of {labels.dtype}: give the numbers of classes, as int64")


def _check_ranges(targets: Sequence[Target], classes: int, ranges: Sequence[list[float]]) -> None:
    """Look at (least label, largest label, least value of a mask, largest) of each image with targets."""
    images = [number for number, (_, labels) in enumerate(targets) if len(labels)]
    for number, (least, most, low, high) in zip(images, ranges):
        if not 0 <= least <= most < classes:
            strange = least if least < 0 else most
            raise ValueError(f"image {number} has the label {strange:.0f}, and there are classes 0 to {classes - 1}")
        if not -SLACK <= low <= high <= 1 + SLACK:
            raise ValueError(f"image {number} has masks with values from {low:g} to {high:g}: give masks in 0..1")


def _loss(
    found: QueryLogits,
    targets: Sequence[Target],
    pairs: Sequence[tuple[Tensor, Tensor]],
    count: Tensor,
    points: int,
    extent: tuple[float, float],
) -> Tensor:
    """Of one prediction; ``pairs`` are the queries and targets of each image that belong together."""
    classes, masks = found.class_queries_logits, found.masks_queries_logits
    nothing = classes.shape[-1] - 1
    wanted = torch.full(classes.shape[:2], nothing, device=classes.device)
    for row, (query, number), (_, labels) in zip(wanted, pairs, targets):
        row[query] = labels[number]
    weight = torch.ones(nothing + 1, device=classes.device)
    weight[nothing] = NOTHING
    cross_entropy = F.cross_entropy(classes.transpose(1, 2), wanted, weight)

    bce = dice = masks[..., :0].sum()  # 0, and the masks have a gradient
    for own, (query, number), (wanted_masks, _) in zip(masks, pairs, targets):
        if len(query):
            logits, truth = own[query][:, None], wanted_masks[number][:, None]  # (n, 1, h, w), (n, 1, H, W)
            with torch.no_grad():
                places = _hard_points(logits, points, extent)
                seen = _sampled(truth, places)
            said = _sampled(logits, places, extent)
            bce = bce + F.binary_cross_entropy_with_logits(said, seen, reduction="none").mean(1).sum()
            dice = dice + _dice(said.sigmoid(), seen).sum()
    return CLASS * cross_entropy + (BCE * bce + DICE * dice) / count


def _dice(inside: Tensor, truth: Tensor) -> Tensor:
    """(n, points) twice -> (n,)."""
    return 1 - (2 * (inside * truth).sum(1) + 1) / (inside.sum(1) + truth.sum(1) + 1)


def _mean_count(count: int, like: Tensor) -> Tensor:
    """Targets of this batch, the mean over the processes, at least 1."""
    counted = like.new_full((), float(count), dtype=torch.float32)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counted)
        counted = counted / torch.distributed.get_world_size()
    return counted.clamp(min=1)


# ------------------------------------------------------------------------------------------------------- matching


@torch.no_grad()
def _matched(
    predictions: Sequence[QueryLogits], targets: Sequence[Target], points: int, extent: tuple[float, float]
) -> list[list[tuple[Tensor, Tensor]]]:
    """For each prediction and image: queries and targets that belong together."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        from adaptkit.version import DISTRIBUTION

        raise ImportError(f"queries are matched by scipy: pip install '{DISTRIBUTION}[recipes]'") from error
    classes = predictions[-1].class_queries_logits.shape[-1] - 1  # the last is "nothing"
    ranges = [torch.stack([*labels.aminmax(), *masks.aminmax()]) for masks, labels in targets if len(labels)]
    costs = [
        _costs(p.class_queries_logits[b], p.masks_queries_logits[b], masks, labels, points, extent)
        for p in predictions
        for b, (masks, labels) in enumerate(targets)
    ]
    parts = [part.flatten() for part in (*costs, *ranges)]
    host = torch.cat(parts).cpu().split([part.numel() for part in parts])  # one wait for all of them
    _check_ranges(targets, classes, [part.tolist() for part in host[len(costs) :]])
    pairs = [
        torch.from_numpy(np.stack(linear_sum_assignment(flat.view(cost.shape).nan_to_num(1e9).numpy())))
        for cost, flat in zip(costs, host)
    ]  # each (2, matches): queries, targets
    there = torch.cat(pairs, dim=1).to(predictions[0].masks_queries_logits.device)  # one copy for all of them
    found = [(rows, columns) for rows, columns in there.split([pair.shape[1] for pair in pairs], dim=1)]
    images = len(targets)
    return [found[i : i + images] for i in range(0, len(found), images)]


def _costs(
    classes: Tensor, masks: Tensor, truth: Tensor, labels: Tensor, points: int, extent: tuple[float, float]
) -> Tensor:
    """Of one image, each query (Q, K + 1), (Q, h, w) with each target (n, H, W), (n,) -> (Q, n)."""
    places = torch.rand(1, points, 2, device=masks.device)
    said = _sampled(masks[:, None], places.expand(len(masks), -1, -1), extent)  # (Q, points)
    seen = _sampled(truth[:, None], places.expand(len(truth), -1, -1))  # (n, points)
    bce = (F.softplus(-said) @ seen.T + F.softplus(said) @ (1 - seen).T) / points
    inside = said.sigmoid()
    dice = 1 - (2 * inside @ seen.T + 1) / (inside.sum(1)[:, None] + seen.sum(1) + 1)
    known = labels.clamp(0, classes.shape[-1] - 1)  # of another one the caller is told, when the costs are there
    return CLASS * -classes.softmax(-1)[:, known] + BCE * bce + DICE * dice


# --------------------------------------------------------------------------------------------------------- points


def _sampled(masks: Tensor, places: Tensor, extent: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Masks (n, 1, H, W) at places (n, points, 2), x and y in 0..1 of the image -> (n, points), bilinear."""
    if not len(masks):
        return masks.new_zeros(0, places.shape[1])
    share = pair(extent[1], extent[0], places)
    return F.grid_sample(masks, 2 * (places * share)[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


def _hard_points(logits: Tensor, points: int, extent: tuple[float, float]) -> Tensor:
    """Logits (n, 1, h, w) -> places (n, points, 2): those where they are nearest to 0, and random ones."""
    tried = torch.rand(len(logits), OVERSAMPLE * points, 2, device=logits.device)
    hard = int(IMPORTANT * points)
    index = (-_sampled(logits, tried, extent).abs()).topk(hard, dim=1).indices
    chosen = tried.gather(1, index[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, torch.rand(len(logits), points - hard, 2, device=logits.device)], dim=1)
