"""Panoptic quality, against COCO's rules written pixel by pixel, and by hand."""

import pytest
import torch

from recipes.scores.panoptic import CROWD, NOTHING, PanopticQuality, counted

K = 3


def image(*rows):
    """Rows of (label, id) -> (H, W, 2)."""
    return torch.tensor(rows)


def by_the_rules(found, true):
    """COCO's evaluation in sets of pixels."""
    pixels = [(i, j) for i in range(true.shape[0]) for j in range(true.shape[1])]

    def grouped(x):
        parts = {}
        for p in pixels:
            parts.setdefault(tuple(x[p].tolist()), set()).add(p)
        return parts

    truth, said = grouped(true), grouped(found)
    void = set().union(*(s for (label, _), s in truth.items() if label == NOTHING))
    sums, matched_true, matched_said = torch.zeros(4, K, dtype=torch.float64), set(), set()
    for one, a in truth.items():
        for other, b in said.items():
            if one[0] != other[0] or one[0] < 0:
                continue
            iou = len(a & b) / (len(a | b) - len(void & b))
            if iou > 0.5:
                sums[:2, one[0]] += torch.tensor([iou, 1.0])
                matched_true.add(one)
                matched_said.add(other)
    for label, number in truth:
        if label >= 0 and (label, number) not in matched_true:
            sums[3, label] += 1
    for (label, number), b in said.items():
        if label < 0 or (label, number) in matched_said:
            continue
        crowd = set().union(*(s for (k, _), s in truth.items() if k == CROWD - label))
        if len(b & (void | crowd)) <= len(b) / 2:
            sums[2, label] += 1
    return sums


@pytest.mark.parametrize("seed", range(20))
def test_segments_are_counted_by_cocos_rules(seed):
    g = torch.Generator().manual_seed(seed)
    labels = [0, 1, 2, NOTHING, CROWD, CROWD - 1]
    kinds = torch.tensor([labels[i] for i in torch.randint(6, (5,), generator=g)])
    t = torch.randint(5, (4, 4), generator=g).repeat_interleave(2, 0).repeat_interleave(2, 1)
    true = torch.stack([kinds[t], t + 1], -1)
    f = torch.where(torch.rand(8, 8, generator=g) < 0.3, torch.randint(6, (8, 8), generator=g), t)
    said = torch.tensor([*torch.where(kinds < 0, CROWD - kinds, kinds).clamp(0, K - 1).tolist(), NOTHING])
    found = torch.stack([said[f], f + 1], -1)
    assert torch.allclose(counted(found, true, K), by_the_rules(found, true))


def test_a_crowd_forgives_its_own_category_alone():
    crowd = torch.tensor([CROWD - 0, 7]).expand(4, 4, 2).clone()
    for label, wrong in ((0, 0.0), (1, 1.0)):
        found = torch.tensor([label, 1]).expand(4, 4, 2)
        assert counted(found, crowd, K)[2].tolist() == [0.0, wrong, 0.0]
    assert counted(torch.tensor([NOTHING, 0]).expand(4, 4, 2), crowd, K).sum() == 0  # a crowd is not missed


def test_the_union_keeps_a_crowd_and_leaves_out_what_is_unlabelled():
    truth = torch.full((1, 10, 2), 5)
    truth[..., 0] = 0
    found = truth.clone()
    for label, expected in ((CROWD - 1, 0.6), (NOTHING, 1.0)):
        truth[0, 6:] = torch.tensor([label, 9])
        assert counted(found, truth, K)[0, 0].item() == pytest.approx(expected)


def test_the_mean_is_over_categories_that_occur():
    quality = PanopticQuality([{"isthing": 1}, {"isthing": 0}, {"isthing": 1}])
    truth = torch.zeros(2, 4, 2, dtype=torch.int64)
    truth[1] = torch.tensor([1, 1])
    found = truth.clone()
    found[1, :1] = torch.tensor([NOTHING, 0])
    quality.update([found], [truth])
    assert quality.by_class() == [1.0, 0.75, None]
    assert quality.compute() == {"pq": 0.875, "sq": 0.875, "rq": 1.0, "pq_things": 1.0, "pq_stuff": 0.75}
    assert quality.details()["per_image"] == [0.875]
