"""Monocular depth: the usual scores, image by image, and the crops that published numbers use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bootstrap import interval

NAMES = ("delta1", "delta2", "delta3", "abs_rel", "rmse", "silog")


def image_scores(prediction: Tensor, target: Tensor) -> Tensor | None:
    """Depths (H, W) in metres, targets of 0 not measured -> the scores (6,); None where nothing was measured.

    delta1, delta2, delta3 are the shares of pixels where max(p / t, t / p) is below 1.25, 1.25^2, 1.25^3; abs_rel is
    the mean |p - t| / t, rmse the root of the mean (p - t)^2 in metres, silog the standard deviation of log(p / t)
    times 100.
    """
    known = target > 0
    if not known.any():
        return None
    p, t = prediction[known].double(), target[known].double()
    ratio, log = torch.maximum(p / t, t / p), (p / t).log()
    deltas = [(ratio < 1.25**k).double().mean() for k in (1, 2, 3)]
    errors = [((p - t).abs() / t).mean(), (p - t).square().mean().sqrt(), 100 * log.std(correction=0)]
    return torch.stack([*deltas, *errors])


def cropped(target: Tensor, crop: str | None) -> Tensor:
    """Return depths (H, W) with 0 outside of a published crop.

    ``"eigen"``: rows 45..470 and columns 41..600 of NYU's 480 x 640 (Eigen et al. 2014). ``"garg"``: of KITTI's images,
    rows 0.40810811 H..0.99189189 H, columns 0.03594771 W..0.96405229 W (Garg et al. 2016). In proportion for others.
    """
    if crop is None:
        return target
    height, width = target.shape
    if crop == "eigen":
        shares = (45 / 480, 471 / 480, 41 / 640, 601 / 640)
        rows = [round(s * height) for s in shares[:2]]
        columns = [round(s * width) for s in shares[2:]]
    else:
        rows = [int(0.40810811 * height), int(0.99189189 * height)]
        columns = [int(0.03594771 * width), int(0.96405229 * width)]
    kept = torch.zeros_like(target)
    kept[rows[0] : rows[1], columns[0] : columns[1]] = target[rows[0] : rows[1], columns[0] : columns[1]]
    return kept


class DepthScores:
    """Adds up images one by one; a score is the mean over images."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add one image, (H, W) each."""
        scores = image_scores(prediction, target)
        self.images += [] if scores is None else [scores]

    def details(self) -> dict[str, Any]:
        """Return the means, with intervals. ``ValueError`` where no image had a measured pixel."""
        if not self.images:
            raise ValueError("no image has a depth in the range; look at --depth-scale and the file's max_depth")
        scores = torch.stack(self.images)
        count = len(scores)
        between = {
            name: list(interval(scores[:, k : k + 1], lambda sums: sums[:, 0] / count))
            for k, name in enumerate(NAMES)
            if name in ("delta1", "rmse")
        }
        return {**dict(zip(NAMES, scores.mean(0).tolist())), "images": count, "interval": between,
                "per_image": scores[:, 0].tolist()}  # fmt: skip
