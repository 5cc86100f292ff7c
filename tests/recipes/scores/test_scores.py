"""The formulas of the scores, against slow code that follows their definitions word by word."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from recipes.scores.bootstrap import ROUNDS, interval
from recipes.scores.calibration import BINS, calibration_sums, ece
from recipes.scores.depth import cropped
from recipes.scores.segmentation import SemanticScores, boundary, confusion, mean_iou


def ids(shape, classes, seed, coarse=5):
    rng = np.random.default_rng(seed)
    height, width = shape
    blocks = rng.integers(0, classes, (math.ceil(height / coarse), math.ceil(width / coarse)))
    return torch.from_numpy(blocks.repeat(coarse, 0).repeat(coarse, 1)[:height, :width].copy())


@pytest.mark.parametrize("shape", [(40, 60), (7, 300), (1, 9)])
def test_boundary_iou_erodes_as_defined(shape):
    prediction, target = ids(shape, 3, 0), ids(shape, 4, 1)
    target[::3, ::7] = 255
    reach = max(1, round(0.02 * math.hypot(*shape)))
    sums = boundary(prediction, target, 4, 255)
    known = target.numpy() != 255
    for label in range(4):
        rims = []
        for one in (prediction, target):
            mask = np.pad(one.numpy() == label, 1)  # the border of the image is a contour
            inside = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=reach)
            rims.append((mask & ~inside)[1:-1, 1:-1] & known)
        assert sums[:, label].tolist() == [(rims[0] & rims[1]).sum(), (rims[0] | rims[1]).sum()]


def test_calibration_is_the_weighted_gap_of_its_bins():
    rng = np.random.default_rng(2)
    sure = torch.from_numpy(np.concatenate([rng.random(500), [0.0, 1.0, 1 / BINS, 2 / BINS]]))
    right = torch.from_numpy(rng.random(504) < 0.6)
    expected = 0.0
    for k in range(BINS):
        low, high = k / BINS, (k + 1) / BINS
        here = (sure > low) & (sure <= high) | ((sure == 0) & (k == 0))
        if here.any():
            gap = abs(right[here].double().mean() - sure[here].mean())
            expected += float(gap) * int(here.sum()) / len(sure)
    parts = torch.stack([calibration_sums(sure[:200], right[:200]), calibration_sums(sure[200:], right[200:])])
    assert float(ece(parts.sum(0))) == pytest.approx(expected, abs=1e-12)


def test_an_interval_is_that_of_sets_drawn_with_replacement():
    counts = torch.rand(30, 3, 4, generator=torch.Generator().manual_seed(3)) * 100
    counts[:, 0] = torch.minimum(counts[:, 1], counts[:, 2]) * 0.7  # right is at most predicted and true
    drawn = torch.randint(30, (ROUNDS, 30), generator=torch.Generator().manual_seed(5))
    scores = [float(mean_iou(counts.double()[rows].sum(0))) for rows in drawn]
    expected = np.quantile(scores, [0.025, 0.975])
    assert interval(counts, mean_iou, seed=5) == pytest.approx(expected, abs=1e-9)
    same = counts[:1].expand(30, 3, 4)
    low, high = interval(same, mean_iou)
    assert high - low == pytest.approx(0, abs=1e-12)


def test_a_class_that_is_nowhere_counts_nowhere():
    scores = SemanticScores()
    prediction, target = torch.tensor([[0, 1, 1, 0]]), torch.tensor([[0, 1, 0, 255]])
    scores.update(confusion(prediction, target, 4, 255)[None])
    found = scores.details()
    assert found["per_class"] == [0.5, 0.5, None, None]
    assert found["per_class_accuracy"] == [0.5, 1.0, None, None]
    assert (found["miou"], found["macc"], found["aacc"]) == pytest.approx((0.5, 0.75, 2 / 3))
    assert found["confusion"] == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_crops_of_depth_have_the_published_corners():
    inside = cropped(torch.ones(480, 640), "eigen").nonzero()
    assert (inside.amin(0).tolist(), inside.amax(0).tolist()) == ([45, 41], [470, 600])
    inside = cropped(torch.ones(375, 1242), "garg").nonzero()  # of KITTI: rows 153..370, columns 44..1196
    assert (inside.amin(0).tolist(), inside.amax(0).tolist()) == ([153, 44], [370, 1196])
