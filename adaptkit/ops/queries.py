"""What masks and classes of queries say of an image: classes, segments, instances (Cheng et al. 2021, 2022)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Resize", "class_scores", "instances", "merge", "stretched"]

Size = tuple[int, int]
Resize = Callable[[Tensor, Size], Tensor]  #: mask logits (B, Q, h, w) and a size (H, W) -> (B, Q, H, W)


def stretched(masks: Tensor, size: Size) -> Tensor:
    """(B, Q, h, w) -> (B, Q, H, W), bilinear, the whole of one grid over the whole of the other."""
    return F.interpolate(masks, size, mode="bilinear", align_corners=False)


def class_scores(classes: Tensor, masks: Tensor, size: Size, resize: Resize = stretched) -> Tensor:
    """Return the sum over queries of p(class) * p(mask) (MaskFormer, section 3.4).

    classes: logits (B, Q, K + 1), the last of "nothing"; masks: logits (B, Q, h, w). Returns (B, K, H, W).
    """
    inside = resize(masks.float(), size).sigmoid()
    return torch.einsum("bqc,bqhw->bchw", classes.float().softmax(-1)[..., :-1], inside)


def merge(
    classes: Tensor,
    masks: Tensor,
    size: Size,
    things: set[int],
    thresholds: tuple[float, float],
    resize: Resize = stretched,
) -> Tensor:
    """Make one panoptic map of the queries of one image (MaskFormer, section 3.4).

    Each pixel goes to the query with the largest p(class) * p(mask), and is said to be its where it lies in its mask
    too, p(mask) >= 1/2. A query whose class is uncertain takes no part, and one that has few pixels for the size of its
    mask is dropped. Segments of one stuff class are one segment.

    Args:
        classes: logits (Q, K + 1), the last of "nothing".
        masks: logits (Q, h, w).
        size: (H, W) of the image.
        things: labels of which each query is a segment by itself.
        thresholds: least score of a query, and least number of pixels that it gets, as a share of its mask's.
        resize: brings the masks to that size.

    Returns (H, W, 2) int64, label and segment id of each pixel; label -1 where nothing was found.
    """
    result = torch.full((*size, 2), -1, dtype=torch.int64, device=classes.device)
    scores, labels = classes.float().softmax(-1).max(-1)
    keep = (labels < classes.shape[-1] - 1) & (scores > thresholds[0])
    if not keep.any():
        return result
    scores, labels = scores[keep], labels[keep]
    inside = resize(masks[keep][None].float(), size)[0].sigmoid()
    owner = (scores[:, None, None] * inside).argmax(0)  # (H, W)
    whole = inside >= 0.5
    visible = whole.gather(0, owner[None])[0]  # pixels that lie inside the mask of their owner
    won, seen = (  # pixels of each query, and those of them inside of its mask
        torch.zeros_like(labels).scatter_add_(0, owner.flatten(), counted.flatten().long())
        for counted in (torch.ones_like(owner), visible)
    )
    kept = (seen > 0) & (won >= thresholds[1] * whole.sum((1, 2)))
    is_thing = torch.isin(labels, torch.tensor(sorted(things), device=labels.device))
    number = torch.arange(1, len(labels) + 1, device=labels.device)
    segment = torch.stack([labels, number * is_thing], dim=-1)  # (Q, 2)
    return torch.where((visible & kept[owner])[..., None], segment[owner], result)


def instances(
    classes: Tensor, masks: Tensor, size: Size, most: int = 100, resize: Resize = stretched
) -> dict[str, Tensor]:
    """Return the surest objects of one image (Mask2Former, its instance inference).

    Of all pairs of a query and a class the ``most`` probable ones; a mask is where its logit is above 0, its score
    p(class) times the mean p(mask) inside. Pairs with an empty mask are left out.

    Args:
        classes: logits (Q, K + 1), the last of "nothing".
        masks: logits (Q, h, w).
        size: (H, W) of the image.
        most: how many pairs there are at most.
        resize: brings the masks to that size.

    Returns what torchvision's detectors do, the surest first: ``boxes`` (n, 4) as x1, y1, x2, y2 in pixels, ``scores``
    (n,), ``labels`` (n,) from 1 on, ``masks`` (n, 1, H, W) of zeros and ones.
    """
    shares = classes.float().softmax(-1)[:, :-1]  # (Q, K)
    likely, place = shares.flatten().topk(min(most, shares.numel()))
    query, label = place // shares.shape[1], place % shares.shape[1]
    logits = resize(masks[query][None].float(), size)[0]
    inside = logits > 0
    area = inside.sum((1, 2))
    scores = likely * (logits.sigmoid() * inside).sum((1, 2)) / area.clamp(min=1)
    order = scores.argsort(descending=True, stable=True)
    order = order[area[order] > 0]
    inside = inside[order]
    return {
        "boxes": _boxes(inside),
        "scores": scores[order],
        "labels": label[order] + 1,
        "masks": inside[:, None].float(),
    }


def _boxes(inside: Tensor) -> Tensor:
    """(n, H, W) bool, none empty -> (n, 4), the edges x1, y1, x2, y2 of what is inside."""
    sides = []
    for axis in (1, 2):  # over rows: columns; over columns: rows
        line = inside.any(axis).int()
        sides.append((line.argmax(1), line.shape[1] - line.flip(1).argmax(1)))
    (x1, x2), (y1, y2) = sides
    return torch.stack([x1, y1, x2, y2], dim=1).float()
