"""Depth: units, holes and scores by hand; a recipe that ends with a file."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import TINY

import adaptkit
from adaptkit.losses import silog_loss
from recipes import depth
from recipes.data import open_dataset
from recipes.drawn import room, rooms
from recipes.scores.depth import DepthScores

QUICK = ["--max-depth", "10", "--size", "32", "48", "--batch-size", "2", *TINY, "--steps", "2"]


def test_scores_are_those_counted_by_hand():
    prediction = torch.tensor([[[[2.0, 3.0], [8.0, 5.0]]], [[[1.0, 1.0], [1.0, 1.0]]]])
    target = torch.tensor([[[[2.0, 2.0], [4.0, 0.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])  # 0: not measured
    metric = DepthScores()
    metric.update(prediction, target)
    said = metric.compute()
    assert metric.details()["images"] == 1
    assert metric.details()["per_image"] == [pytest.approx(1 / 3), None]
    assert said["delta1"] == pytest.approx(1 / 3)  # ratios 1, 1.5, 2
    assert said["delta2"] == pytest.approx(2 / 3)  # below 1.5625
    assert said["delta3"] == pytest.approx(2 / 3)  # below 1.953125
    assert said["abs_rel"] == pytest.approx((0 + 0.5 + 1) / 3)
    assert said["rmse"] == pytest.approx(math.sqrt((0 + 1 + 16) / 3))
    logs = np.log([1, 1.5, 2])
    assert said["silog"] == pytest.approx(100 * math.sqrt((logs**2).mean() - logs.mean() ** 2))


def test_each_image_weighs_the_same_however_many_of_its_pixels_were_measured():
    prediction = torch.ones(2, 1, 1, 4)
    target = torch.tensor([[[[1.0, 1.0, 1.0, 1.0]]], [[[2.0, 0.0, 0.0, 0.0]]]])
    metric = DepthScores()
    metric.update(prediction, target)
    assert metric.compute()["delta1"] == 0.5


def test_no_measured_pixel_at_all_is_an_error():
    with pytest.raises(ValueError, match="no validation image has a depth in the range"):
        DepthScores().compute()


def test_the_loss_forgives_a_common_scale_as_far_as_it_says():
    target = torch.tensor([[1.0, 2.0, 0.0, 4.0]])
    assert silog_loss(3 * target + 1e9 * (target == 0), target, variance_focus=1.0).item() < 1e-3
    assert silog_loss(3 * target, target, variance_focus=0.0).item() == pytest.approx(math.log(3), rel=1e-4)
    assert silog_loss(3 * target, target).item() == pytest.approx(math.log(3) * math.sqrt(0.15), rel=1e-4)
    p = torch.tensor([[2.0]], requires_grad=True)
    silog_loss(p, torch.zeros(1, 1)).backward()  # nothing measured: no loss, no gradient, no NaN
    assert p.grad.item() == 0


@pytest.mark.parametrize(("bins", "low", "high"), [(16, 0.5, 8.0), (0, 0.5, 8.0)])
def test_the_head_answers_in_its_range_at_the_size_of_the_image(bins, low, high):
    head = adaptkit.DepthHeadConfig(max_depth=high, min_depth=low, bins=bins, channels=16)
    model = adaptkit.attach(adaptkit.demo_backbone(False), "sfp", head=head).eval()
    out = model(torch.randn(2, 3, 33, 50)).logits
    assert out.shape == (2, 1, 33, 50)
    assert low <= out.min()
    assert out.max() <= high
    if bins:
        votes = torch.zeros(1, bins, 1, 1)
        votes[0, 5] = 1e6
        assert model.head.depth(votes).item() == pytest.approx(float(np.linspace(low, high, bins)[5]), rel=1e-3)
    else:
        assert model.head.depth(torch.zeros(1, 1, 1, 1)).item() == pytest.approx(math.sqrt(low * high))  # the middle


def test_impossible_ranges_are_refused():
    with pytest.raises(ValueError, match="give 0 < min_depth < max_depth"):
        adaptkit.DepthHeadConfig(max_depth=1.0, min_depth=2.0)
    with pytest.raises(ValueError, match="bins=1: give at least 2"):
        adaptkit.DepthHeadConfig(max_depth=1.0, bins=1)


# ----------------------------------------------------------------------------------------------------------- data


@pytest.fixture
def folder(tmp_path):
    """Two images with 16-bit maps: 256 values per metre, with holes and things too far."""
    for kind in ("images", "depth"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    values = np.full((40, 60), 512, np.uint16)
    values[:, 30:], values[:10], values[10:20] = 256 * 3 + 64, 0, 60000
    for i in range(2):
        Image.new("RGB", (60, 40), (90, 120, 30)).save(tmp_path / "set" / "images" / f"{i}.png")
        Image.fromarray(values).save(tmp_path / "set" / "depth" / f"{i}.png")
    return str(tmp_path / "set")


def test_sixteen_bits_become_metres_and_the_rest_is_not_measured(folder):
    args = depth.parse(["--train", folder, *QUICK, "--depth-scale", "256", "--size", "40", "60"])
    rows = depth.DepthData(
        open_dataset(folder, "train", names=depth.DEPTH_NAMES), depth.build(args).vit.source(), args, False
    )
    image, metres = rows[0]
    assert image.shape == (3, 40, 60)
    assert metres.shape == (1, 40, 60)
    assert metres.dtype == torch.float32
    assert (metres[0, :20] == 0).all()  # a hole, and 234 m of at most 10
    assert (metres[0, 20:, :30] == 2.0).all()
    assert (metres[0, 20:, 30:] == 3.25).all()


def test_training_moves_image_and_depth_together_and_scales_no_depth():
    args = Namespace(seed=0, depth_scale=1000.0, min_depth=1e-3, max_depth=10.0, size=[64, 96])
    grey = np.random.default_rng(0).integers(1, 250, (8, 12)).repeat(12, 0).repeat(12, 1).astype(np.uint8)
    row = {"image": Image.fromarray(grey).convert("RGB"), "mask": Image.fromarray(grey.astype(np.uint16) * 40)}
    rows = depth.DepthData([row], adaptkit.core.view.Source(mean=(0.5,) * 3, std=(0.5,) * 3), args, train=True)
    rows.transform.transforms = [
        t for t in rows.transform.transforms if type(t).__name__ not in ("ColorJitter", "Normalize")
    ]
    image, metres = rows[1, 0]
    assert metres.shape == (1, 64, 96)
    off = (image[0] * 255 * 0.04 - metres[0]).abs()  # the image was drawn from the depth
    assert off.median() < 0.1
    assert set(metres.unique().tolist()) <= {
        float(np.float32(v) * np.float32(40) / np.float32(1000)) for v in range(1, 250)
    }


def test_maps_that_hold_no_depth_in_range_say_what_they_hold(folder, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"no pixel of the first 2 depth maps lies in 0.001\.\.10.0 metres: their values are 0\.\.60000, at --depth-scale 1 ",
    ):
        depth.main(["--train", folder, *QUICK, "--depth-scale", "1", "--out", str(tmp_path / "o")])


def test_a_drawn_room_obeys_its_camera():
    rng = np.random.default_rng(0)
    image, metres = room(rng, (48, 64))
    assert image.shape == (48, 64, 3)
    assert metres.shape == (48, 64)
    assert 0.5 < metres.min() < metres.max() <= 9.0
    free = metres[-12:, :].max(1)  # the floor comes nearer towards the bottom
    assert (np.diff(free) <= 1e-9).all()
    stored = rooms(1, seed=0, scale=1000.0, size=(48, 64))[0]["mask"]
    np.testing.assert_allclose(np.asarray(stored) / 1000, metres, atol=5.1e-4)  # 16 bits survive


@pytest.mark.parametrize("bins", ["0", "8"])
def test_from_drawn_rooms_to_a_file_that_attaches(bins, tmp_path):
    result = depth.main(
        ["--train", "drawn:4", "--val", "drawn:3", *QUICK, "--adapter", "sfp", "--bins", bins, "--out", str(tmp_path)]
    )
    assert result["delta1"] == result["delta1_reattached"]
    assert set(depth.PERCENT) | {"abs_rel", "rmse", "silog"} <= result.keys()
