"""Detection, image by image: average precision is of a set, and says nothing of which images went well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchvision.ops import box_iou

SURE, NEAR = 0.5, 0.5  #: least score of a box that counts, least IoU of a match


def image_f1(found: Sequence[dict[str, Any]], true: Sequence[dict[str, Any]]) -> float | None:
    """Return ``2 TP / (2 TP + FP + FN)`` of one image; None where nothing is there and nothing was found.

    Args:
        found: ``bbox`` (x, y, width, height), ``label`` and ``score``; those below ``SURE`` do not count.
        true: ``box`` (x1, y1, x2, y2) and ``label``.

    The surest box chooses first, among the true boxes of its class that are left and overlap by ``NEAR``.
    """
    sure = sorted((f for f in found if f["score"] >= SURE), key=lambda f: -f["score"])
    if not sure and not true:
        return None
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (f["bbox"] for f in sure)]).view(-1, 4)
    overlap = box_iou(boxes, torch.tensor([t["box"] for t in true], dtype=boxes.dtype).view(-1, 4))
    left, hits = set(range(len(true))), 0
    for f, row in zip(sure, overlap.tolist()):
        fits = [k for k in left if true[k]["label"] == f["label"] and row[k] >= NEAR]
        if fits:
            left.discard(max(fits, key=row.__getitem__))
            hits += 1
    return 2 * hits / (len(sure) + len(true))
