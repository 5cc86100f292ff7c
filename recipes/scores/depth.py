"""Monocular depth: the usual scores, image by image, and the crops that published numbers use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bootstrap import interval

NAMES = ("delta1", "delta2", "delta3", "abs_rel", "rmse", "silog")


def image_scores(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Depths (B, ...) in metres -> scores (B, 6) in the order of NAMES, and whether an image has a measured pixel (B,).

    Targets of 0 were not measured, and are left out; of what was, p predicted and t true: delta1, delta2, delta3 are
    the shares of pixels where max(p / t, t / p) is below 1.25, 1.25^2, 1.25^3; abs_rel is the mean |p - t| / t, rmse
    the root of the mean (p - t)^2 in metres, silog the standard deviation of log(p / t) times 100.
    """
    p, t = prediction.double().flatten(1), target.double().flatten(1)  # (B, N)
    known = t > 0
    p, t = torch.where(known, p, 1.0), torch.where(known, t, 1.0)  # no error, where nothing is known
    pixels = known.sum(1)

    def mean(values: Tensor) -> Tensor:
        return (values * known).sum(1) / pixels.clamp(min=1)

    ratio, log = torch.maximum(p / t, t / p), (p / t).log()
    scores = [mean(ratio < 1.25**k) for k in (1, 2, 3)]
    scores += [mean((p - t).abs() / t), mean((p - t).square()).sqrt()]
    scores.append(100 * mean((log - mean(log)[:, None]).square()).sqrt())
    return torch.stack(scores, 1), pixels > 0


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
    """Adds up images; a score is the mean over those that have a measured pixel."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []  #: (B, 6) scores of images, where the predictions are
        self.measured: list[Tensor] = []  #: (B,), whether an image has a measured pixel

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add images (B, ...) as :func:`image_scores` takes them."""
        scores, measured = image_scores(prediction, target)
        self.rows.append(scores)
        self.measured.append(measured)

    def counted(self) -> Tensor:
        """Return the scores of the images that count (n, 6); ``ValueError`` where there is none."""
        rows = torch.cat(self.rows)[torch.cat(self.measured)].cpu() if self.rows else ()
        if not len(rows):
            raise ValueError(
                "no validation image has a depth in the range; look at --depth-scale and the largest depth"
            )
        return torch.as_tensor(rows)

    def compute(self) -> dict[str, float]:
        """Return the means; errors as :meth:`counted`."""
        return dict(zip(NAMES, self.counted().mean(0).tolist()))

    def details(self) -> dict[str, Any]:
        """Return the means with intervals, and of each image its delta1, None where nothing was measured."""
        scores = self.counted()
        count = len(scores)
        between = {
            name: list(interval(scores[:, k : k + 1], lambda sums: sums[:, 0] / count))
            for k, name in enumerate(NAMES)
            if name in ("delta1", "rmse")
        }
        each = zip(torch.cat(self.rows)[:, 0].tolist(), torch.cat(self.measured).tolist())
        return {**dict(zip(NAMES, scores.mean(0).tolist())), "images": count, "interval": between,
                "per_image": [delta1 if known else None for delta1, known in each]}  # fmt: skip
