"""How sure a score is: the percentile bootstrap over images (Efron and Tibshirani 1993, chapter 13)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDS = 1000


def interval(
    counts: Tensor, score: Callable[[Tensor], Tensor], rounds: int = ROUNDS, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return the interval that holds the score of ``level`` of the sets drawn, with replacement, from these images.

    Args:
        counts: (images, ...) what each image adds to the sums that the score is made of.
        score: sums (rounds, ...) -> scores (rounds,).
        rounds: sets that are drawn.
        seed: of the drawing.
        level: share of them inside.

    Two runs whose intervals on the same images are apart differ by more than the choice of images explains. It says
    nothing of other seeds of the training.
    """
    images = len(counts)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(images, (rounds, images), generator=generator)
    weights = torch.zeros(rounds, images, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(rounds, images, dtype=torch.float64)
    )
    sums = (weights @ counts.double().flatten(1).cpu()).view(rounds, *counts.shape[1:])
    values = score(sums).double()
    values = values[values.isfinite()]
    if not len(values):
        return float("nan"), float("nan")
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(values, ends).tolist()
    return low, high
