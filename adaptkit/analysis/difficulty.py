"""Which images AdaViT finds easy: the MACs of each image, and the cheapest and the dearest (paper, figures 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptkit.adapters.adavit import AdaViT
from adaptkit.analysis import accounting
from adaptkit.analysis.kept import check_deciding
from adaptkit.analysis.style import COLOURS, WIDTH, Drawn, pictured, show
from adaptkit.analysis.watch import batch, source_of
from adaptkit.core.tree import evaluating

__all__ = ["EasyAndHard", "easy_and_hard", "ends"]

BINS = 30


@dataclass(frozen=True, eq=False)
class EasyAndHard(Drawn):
    """What each of some images costs."""

    shares: Tensor  #: (n,) MACs of each image, as a share of the dense model's
    easy: tuple[int, ...]  #: the images that cost least, the least first
    hard: tuple[int, ...]  #: those that cost most, the most first
    pictures: tuple[np.ndarray, ...]  #: of the easy ones, then of the hard ones

    def draw(self, figure: Any) -> None:
        """A histogram of the MACs, and beside it the two rows of images with what each costs."""
        columns = len(self.easy)
        figure.set_size_inches(WIDTH, 1.9)
        grid = figure.add_gridspec(2, columns + 3)
        axes = figure.add_subplot(grid[:, :3])
        values = 100 * self.shares.double().numpy()
        axes.hist(values, bins=min(BINS, max(3, len(values) // 4)), color=COLOURS[0])
        axes.axvline(values.mean(), color="black", linestyle="--", linewidth=0.8)
        axes.set(xlabel="MACs (% of dense; dashed: mean)", ylabel="images")
        for i, (image, picture) in enumerate(zip((*self.easy, *self.hard), self.pictures)):
            row, column = divmod(i, columns)
            tile = figure.add_subplot(grid[row, 3 + column])
            tile.set_axis_off()
            show(tile, picture)
            tile.set_title(f"{values[image]:.0f} %", fontsize=7)


@torch.no_grad()
def easy_and_hard(model: nn.Module, images: Tensor | Sequence[Tensor], count: int = 6) -> EasyAndHard:
    """Return what each image costs, and show the easiest and the hardest.

    Args:
        model: with AdaViT gates; decided as in evaluation.
        images: as :func:`attention_distance`, two or more; of each its own size is the measure.
        count: of each end, at most; no image is at both.

    Raises ``TypeError`` for a model without gates, ``ValueError`` for a single image and where the gates are off.
    """
    AdaViT.of(model)
    model.check_one_acts()
    given, costs, shares = batch(images), {}, []
    for image in given:
        size = (image.shape[-2], image.shape[-1])
        if size not in costs:
            costs[size] = accounting.costs(model, size)
        with evaluating(model):
            aux = check_deciding(model(image).aux)
        shares.append(accounting.macs(costs[size], aux).double().cpu() / costs[size].dense)
    found = torch.cat(shares)
    easy, hard = ends(found, count)
    pictures = pictured([given[i][0] for i in (*easy, *hard)], source_of(model, given[0].shape[1]))
    return EasyAndHard(found, easy, hard, pictures)


def ends(shares: Tensor, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shares (n,) -> the images of the lowest and of the highest, ``count`` of each at most, and none at both ends.

    Raises ``ValueError`` for less than two images or a count below 1.
    """
    if len(shares) < 2 or count < 1:
        raise ValueError(f"of {len(shares)} images and count={count} nothing is easier than another; give two or more")
    order = shares.argsort(stable=True).tolist()
    count = min(count, len(order) // 2)
    return tuple(order[:count]), tuple(order[: -count - 1 : -1])
